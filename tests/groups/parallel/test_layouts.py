import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcomm.errors import ConfigError
from tcomm.groups.parallel.layouts import inner_dp_rows, make_layout


def _rows(text):
    """'0,2 1,3' -> [[0, 2], [1, 3]]; '0-3' is a range."""
    return [
        [rank for part in row.split(",") for rank in _span(part)] for row in text.replace("][", " ").split()
    ]


def _span(part):
    first, _, last = part.partition("-")
    return range(int(first), int(last or first) + 1)


def _singles(*ranks):
    return [[rank] for rank in ranks]


PAIRS_OF_8 = "0,1 2,3 4,5 6,7"
PAIRS_OF_16 = "0,1 2,3 4,5 6,7 8,9 10,11 12,13 14,15"
FOURS_OF_16 = "0-3 4-7 8-11 12-15"

WORKED = [
    (
        {"world_size": 8, "dp": 2, "pp": 2, "tp": 2, "dcp": 2},
        {
            "tp": PAIRS_OF_8,
            "dcp": PAIRS_OF_8,
            "pcp": "0 1 2 3 4 5 6 7",
            "pp": "0,2 1,3 4,6 5,7",
            "dp": "0,4 2,6 1,5 3,7",
            "ep": "0,1,4,5 2,3,6,7",
            "eplb": "0,1,4,5 2,3,6,7",
            "etp": PAIRS_OF_8,
            "engram_dp": "",
            "inner_dp": "0-3 4-7",
        },
    ),
    (
        {"world_size": 8, "pp": 4, "tp": 2},
        {
            "tp": PAIRS_OF_8,
            "pp": "0,2,4,6 1,3,5,7",
            "dp": "0 2 4 6 1 3 5 7",
            "ep": PAIRS_OF_8,
            "inner_dp": "0-7",
        },
    ),
    (
        {"world_size": 8, "dp": 2, "pcp": 2, "tp": 2, "dcp": 2},
        {
            "tp": PAIRS_OF_8,
            "pcp": "0,2 1,3 4,6 5,7",
            "dcp": "0,2 1,3 4,6 5,7",
            "dp": "0,4 2,6 1,5 3,7",
            "ep": "0-7",
        },
    ),
    (
        {"world_size": 8, "dp": 2, "pcp": 2, "tp": 2, "dcp": 2, "context_order": "0.14"},
        {"dcp": PAIRS_OF_8, "pcp": "0,2 1,3 4,6 5,7"},
    ),
    (
        {"world_size": 8, "dp": 2, "tp": 2},
        {"tp": PAIRS_OF_8, "dp": "0,2 1,3 4,6 5,7", "ep": "0-3 4-7", "inner_dp": PAIRS_OF_8},
    ),
    (
        {"world_size": 16, "dp": 2, "pp": 2, "pcp": 2, "tp": 2, "dcp": 4},
        {
            "tp": PAIRS_OF_16,
            "pcp": "0,2 1,3 4,6 5,7 8,10 9,11 12,14 13,15",
            "pp": "0,4 2,6 1,5 3,7 8,12 10,14 9,13 11,15",
            "dp": "0,8 2,10 4,12 6,14 1,9 3,11 5,13 7,15",
            "ep": "0-3,8-11 4-7,12-15",
            "dcp": "0,2,1,3 4,6,5,7 8,10,9,11 12,14,13,15",
        },
    ),
    (
        {"world_size": 16, "dp": 2, "pp": 2, "pcp": 2, "tp": 2, "dcp": 4, "context_order": "0.14"},
        {"dcp": FOURS_OF_16},
    ),
    (
        {"world_size": 16, "pp": 2, "tp": 8, "dcp": 4},
        {
            "tp": "0-7 8-15",
            "dcp": FOURS_OF_16,
            "pp": "0,8 1,9 2,10 3,11 4,12 5,13 6,14 7,15",
            "ep": "0-7 8-15",
        },
    ),
    ({"world_size": 8, "tp": 4, "pcp": 2, "dcp": 2}, {"dcp": "0,4 1,5 2,6 3,7"}),
    ({"world_size": 8, "tp": 4, "pcp": 2, "dcp": 8}, {"dcp": "0,4,1,5,2,6,3,7"}),
    # the engram groups, by hand: data and tensor ranks of one stage together, and parts of a data group
    ({"world_size": 8, "dp": 2, "pp": 2, "tp": 2, "etp": 4}, {"etp": "0,1,4,5 2,3,6,7"}),
    ({"world_size": 8, "dp": 4, "tp": 2, "engram_dp": 2}, {"engram_dp": "0,2 4,6 1,3 5,7"}),
    (
        {"world_size": 8, "dp": 2, "pp": 2, "tp": 2, "engram_dp": 2},
        {"engram_dp": "0,4 2,6 1,5 3,7", "dp": "0,4 2,6 1,5 3,7"},
    ),
]


@pytest.mark.parametrize(
    ("sizes", "wanted"), WORKED, ids=lambda case: "-".join(f"{k}{v}" for k, v in case.items())[:60]
)
def test_the_worked_examples(sizes, wanted):
    layout = make_layout(**sizes)
    assert {kind: getattr(layout, kind) for kind in wanted} == {k: _rows(v) for k, v in wanted.items()}


def test_no_decode_context_size_is_one():
    assert make_layout(4, tp=4, dcp=None) == make_layout(4, tp=4, dcp=1)
    assert make_layout(4, tp=4, pcp=1).dcp == _singles(0, 1, 2, 3)


SIZES = st.tuples(*[st.integers(1, 4)] * 5).filter(lambda sizes: _product(sizes) <= 64)


def _product(sizes):
    product = 1
    for size in sizes:
        product *= size
    return product


@settings(max_examples=150, deadline=None)
@given(SIZES, st.sampled_from(["newest", "0.14"]), st.integers(0, 2))
def test_every_rank_has_one_place_in_every_kind(sizes, order, nth):
    _, dp, pp, pcp, tp = sizes
    world = _product(sizes)
    dcp = ([1, pcp, tp * pcp] if pcp > 1 else [1, tp, tp])[nth]
    if order == "0.14" and tp % dcp and dcp != tp * pcp:
        dcp = 1
    layout = make_layout(world, tp=tp, pp=pp, pcp=pcp, dcp=dcp, dp=dp, etp=tp * dp, context_order=order)
    inner = tp * pp * pcp if dp > 1 else world
    wanted = {
        "tp": tp,
        "pp": pp,
        "pcp": pcp,
        "dcp": dcp,
        "dp": dp,
        "ep": dp * pcp * tp,
        "eplb": dp * pcp * tp,
    }
    for kind, size in {**wanted, "etp": tp * dp, "inner_dp": inner}.items():
        rows = getattr(layout, kind)
        assert {len(row) for row in rows} == {size}, kind
        assert sorted(itertools.chain(*rows)) == list(range(world)), kind
    assert all(row == list(range(row[0], row[0] + tp)) for row in layout.tp)
    _check_places(layout, pp, pcp, tp)


def _check_places(layout, pp, pcp, tp):
    def place(rank):
        return rank % tp, rank // tp % pcp, rank // (tp * pcp) % pp, rank // (tp * pcp * pp)

    for row in layout.pp:
        # the stages in order, all else alike
        assert [place(r)[2] for r in row] == list(range(pp))
        assert len({(place(r)[:2], place(r)[3]) for r in row}) == 1
    for row in layout.pcp:
        assert [place(r)[1] for r in row] == list(range(pcp))
    for row in layout.dp:
        assert len({place(r)[:3] for r in row}) == 1
    for row in layout.ep:
        assert len({place(r)[2] for r in row}) == 1
        members = {frozenset(dp) for dp in layout.dp if dp[0] in row}
        assert set(row) == set().union(*members)
    for row in layout.dcp:
        assert len({r // (tp * pcp) for r in row}) == 1


POSITIVE = "; give 1 or more"


def _message(function, *args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        (
            {"world_size": 6, "tp": 4},
            "a world of 6 ranks is no multiple of 4 = data 1 x pipeline 1 x prefill context 1 x tensor 4 "
            "parallel; give sizes whose product is one of 1, 2, 3, 6, or 4 ranks",
        ),
        (
            {"world_size": 4, "tp": 4, "pp": 2},
            "a world of 4 ranks is no multiple of 8 = data 1 x pipeline 2 x prefill context 1 x tensor 4 "
            "parallel; give sizes whose product is one of 1, 2, 4, or 8 ranks",
        ),
        ({"world_size": 0}, "a world size of 0 is no positive integer; give 1 or more"),
        ({"world_size": 4, "tp": 0}, "a tensor parallel size of 0 is no positive integer; give 1 or more"),
        (
            {"world_size": 4, "pp": -2},
            "a pipeline parallel size of -2 is no positive integer; give 1 or more",
        ),
        (
            {"world_size": 4, "pcp": True},
            "a prefill context parallel size of True is no positive integer" + POSITIVE,
        ),
        ({"world_size": 4, "dp": 2.0}, "a data parallel size of 2.0 is no positive integer; give 1 or more"),
        (
            {"world_size": 4, "dcp": False},
            "a decode context parallel size of False is no positive integer" + POSITIVE,
        ),
        (
            {"world_size": 4, "tp": 4, "dcp": 3},
            "a decode context parallel size of 3 does not fit tensor 4 and prefill context 1 parallel; "
            "give one of 1, 2, 4",
        ),
        (
            {"world_size": 8, "tp": 4, "pcp": 2, "dcp": 4},
            "a decode context parallel size of 4 does not fit tensor 4 and prefill context 2 parallel; "
            "give one of 1, 2, 8",
        ),
        (
            {"world_size": 6, "tp": 3, "pcp": 2, "dcp": 2, "context_order": "0.14"},
            "a decode context parallel size of 2 does not fit tensor 3 and prefill context 2 parallel; "
            "give one of 1, 3, 6",
        ),
        ({"world_size": 4, "context_order": "0.15"}, "context_order='0.15' is neither 'newest' nor '0.14'"),
        (
            {"world_size": 4, "dp": 2, "tp": 2, "etp": 3},
            "an engram tensor parallel size of 3 does not divide data 2 x tensor 2 parallel; "
            "give one of 1, 2, 4",
        ),
        (
            {"world_size": 4, "dp": 4, "engram_dp": 3},
            "an engram data parallel size of 3 does not divide a data parallel size of 4; "
            "give one of 1, 2, 4",
        ),
        (
            {"world_size": 4, "etp": 0},
            "an engram tensor parallel size of 0 is no positive integer" + POSITIVE,
        ),
        (
            {"world_size": 4, "engram_dp": "2"},
            "an engram data parallel size of '2' is no positive integer" + POSITIVE,
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_what_would(sizes, told):
    assert _message(make_layout, **sizes) == told


def test_replicas_are_blocks_and_one_replica_is_the_world():
    assert inner_dp_rows(8, 4, 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert inner_dp_rows(4, 2, 1) == [[0, 1, 2, 3]]
    assert _message(inner_dp_rows, 8, 3, 2) == (
        "a world of 8 ranks is no multiple of a replica of 3; give one of 1, 2, 4, 8"
    )
    assert _message(inner_dp_rows, 8, 0, 2) == "a replica size of 0 is no positive integer; give 1 or more"
