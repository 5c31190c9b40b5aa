import pytest
import torch

from tcomm.cli.cases import VERBS, Case, check_size, parts_of
from tcomm.cli.workers import Ranks, why_no_mpi
from tcomm.errors import ConfigError
from tests.cli import jobs

NAMES = ["gloo"] if why_no_mpi() else ["gloo", "mpi"]
MEASURED = [
    *((op, "sum") for op in VERBS),
    *((op, "avg") for op in ("all_reduce", "reduce", "reduce_scatter", "reduce_scatterv")),
    ("all_reduce", "max"),
    ("reduce", "max"),
    ("reduce_scatter", "min"),
    ("reduce_scatterv", "max"),
]


@pytest.fixture(scope="module")
def wrong_elements():
    """By op and reduction, of one message that is checked whole, and of one that is sampled."""
    # The second is mostly one number.
    numels = [60, 6 * 5000]
    # Three ranks, whose unequal parts begin at different places; in one call, since each takes a while.
    with Ranks(3, mpi="mpi" in NAMES, timeout=60.0) as ranks:
        found = ranks.run(jobs.wrong_elements, NAMES, MEASURED, numels, timeout=90.0)
    return dict(zip(MEASURED, found, strict=True))


@pytest.mark.parametrize(("op", "redop"), MEASURED)
def test_every_contender_gives_what_the_case_expects(wrong_elements, op, redop):
    found = wrong_elements[op, redop]
    assert len(found) == 2
    for wrong in found:
        assert set(wrong["reused"]) >= set(NAMES)
        assert not any(wrong["reused"].values()), found
        assert not any(wrong["allocated"].values()), found


def _cases(op, numel=24, world_size=3, redop="sum"):
    return [Case(op, rank, world_size, numel, torch.float32, redop, True) for rank in range(world_size)]


@pytest.mark.parametrize(
    ("op", "given", "got"),
    [
        ("all_reduce", [24, 24, 24], [24, 24, 24]),
        ("reduce", [24, 24, 24], [24, 0, 0]),
        ("broadcast", [24, 24, 24], [24, 24, 24]),
        ("all_gather", [8, 8, 8], [24, 24, 24]),
        ("reduce_scatter", [24, 24, 24], [8, 8, 8]),
        ("all_to_all", [24, 24, 24], [24, 24, 24]),
        ("gather", [8, 8, 8], [24, 0, 0]),
        ("scatter", [24, 24, 24], [8, 8, 8]),
        ("all_gatherv", [4, 8, 12], [24, 24, 24]),
        ("reduce_scatterv", [24, 24, 24], [4, 8, 12]),
        ("all_to_allv", [24, 24, 24], [12, 24, 36]),
        ("sendrecv", [24, 24, 24], [24, 24, 24]),
        ("barrier", [0, 0, 0], [0, 0, 0]),
    ],
)
def test_messages_are_counted_as_nccl_tests_counts_them(op, given, got):
    assert [len(case.x) for case in _cases(op)] == given
    assert [len(case.out) for case in _cases(op)] == got


def test_unequal_parts_add_up():
    assert parts_of("all_gatherv", 256, 2) == [85, 171]
    assert sum(parts_of("all_to_allv", 1001, 4)) == 1001


def _block(x, index):
    return x.chunk(3)[index]


def _count_wrong(cases, collective):
    """On rank 0, where the collective gives what it makes of every rank's input."""
    candidates = [case.candidate(lambda: collective([case.x for case in cases])) for case in cases]
    wrong = 0
    # A long message is one number in most calls, and a pattern in one of eight.
    for _ in range(8):
        for candidate in candidates:
            candidate.prepare()
        candidates[0].run()
        wrong += candidates[0].count_wrong()
    return wrong


@pytest.mark.parametrize("numel", [60, 30000])
@pytest.mark.parametrize(
    ("op", "right", "wrong"),
    [
        ("all_gather", torch.cat, lambda xs: torch.cat(xs[::-1])),
        ("gather", torch.cat, lambda xs: torch.cat([xs[0], xs[0], xs[2]])),
        ("broadcast", lambda xs: xs[0], lambda xs: xs[1]),
        ("scatter", lambda xs: _block(xs[0], 0), lambda xs: _block(xs[0], 1)),
        (
            "all_to_all",
            lambda xs: torch.cat([_block(x, 0) for x in xs]),
            lambda xs: torch.cat([_block(x, 1) for x in xs]),
        ),
        ("sendrecv", lambda xs: xs[2], lambda xs: xs[1]),
        ("all_reduce", sum, lambda xs: xs[0] + xs[1] + xs[1]),
    ],
)
def test_elements_of_the_wrong_rank_or_place_are_noticed(op, right, wrong, numel):
    assert _count_wrong(_cases(op, numel), right) == 0
    assert _count_wrong(_cases(op, numel), wrong) > 0


def test_no_result_where_one_is_due_is_wrong_and_where_none_is_due_is_not():
    root, other, _ = _cases("gather")
    for case, is_wrong in ((root, True), (other, False)):
        candidate = case.candidate(lambda: None)
        candidate.prepare()
        candidate.run()
        assert (candidate.count_wrong() > 0) is is_wrong


def test_yesterdays_result_is_wrong():
    (case,) = _cases("all_reduce", 30000, 1)
    candidate = case.candidate(lambda: case.out)
    candidate.prepare()
    candidate.run()
    case.out.copy_(case.x)
    assert candidate.count_wrong() == 0
    for _ in range(9):
        candidate.prepare()
        candidate.run()
        assert candidate.count_wrong() > 0
        case.out.copy_(case.x)


@pytest.mark.parametrize(
    ("op", "nbytes", "ranks", "told"),
    [
        ("all_gather", 1024, 3, "not a multiple of 12 bytes, equal parts of float32 for 3 ranks"),
        ("scatter", 4, 2, "not a multiple of 8 bytes"),
        ("all_reduce", 1023, 2, "not a multiple of 4 bytes, the size of a float32"),
        ("sendrecv", 1024, 1, "needs two ranks"),
    ],
)
def test_a_size_that_cannot_be_cut_is_refused(op, nbytes, ranks, told):
    with pytest.raises(ConfigError, match=told):
        check_size(op, nbytes, torch.float32, ranks)
    check_size(op, 1152, torch.float32, max(2, ranks))
