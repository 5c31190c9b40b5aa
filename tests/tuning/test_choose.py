import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcomm.algorithms import ALGORITHMS, DIRECT_ALGORITHMS, FAMILIES, REDUCE_OPS, REDUCING
from tcomm.errors import CapabilityError
from tcomm.tuning.choose import ENGINES, Capabilities, Decision, Request, asked_of, choose
from tcomm.tuning.table import Row, Table

NAMES = [a.name for a in ALGORITHMS["all_reduce"]]
NO_ROWS = Table(1, "", "", "", "", ())
GLOO = Capabilities(torch_backends=(("cpu", "gloo"), ("cuda", "nccl")))

REASONS = st.sampled_from(["", "there is none"])
REQUESTS = st.builds(
    lambda op, reduce, **kwargs: Request(op, reduce if FAMILIES[op] in REDUCING else "", **kwargs),
    st.sampled_from(["all_reduce", "all_reduce", "all_reduce", *FAMILIES]),
    st.sampled_from([*REDUCE_OPS, "product"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.uint8]),
    nbytes=st.integers(0, 1 << 26),
    world_size=st.integers(2, 16),
    device=st.sampled_from(["cpu", "cpu", "cpu", "cuda"]),
    symmetric=st.booleans(),
)
CAPABILITIES = st.builds(
    Capabilities,
    no_shared_memory=REASONS,
    no_kernels=REASONS,
    torch_backends=st.sampled_from([(), (("cpu", "gloo"),), (("cpu", "gloo"), ("cuda", "nccl"))]),
)
TABLES = st.lists(
    st.builds(
        Row,
        op=st.sampled_from(["all_reduce", "all_reduce", "all_reduce_symmetric", *ALGORITHMS]),
        algorithm=st.sampled_from([*NAMES, "cpu:pull", "cpu:push", "cpu:unheard_of"]),
        max_nbytes=st.none() | st.integers(0, 1 << 20),
        piece_nbytes=st.sampled_from([0, 4096]),
        measured_us=st.sampled_from([{}, {"cpu:two_shot": 3.0, "cpu:one_shot_pull": 5.0}]),
    ),
    max_size=5,
).map(lambda rows: Table(1, "", "", "", "", tuple(rows)))
FORCED = st.sampled_from(
    ["", "", *ENGINES, *NAMES, "two_shot", "one_shot_ll", "push", "triton:pull", "torch:gloo", "unheard_of"]
)


def _decide(request, capabilities, table, forced):
    try:
        return choose(request, capabilities, table, forced)
    except CapabilityError as error:
        return str(error)


@given(REQUESTS, CAPABILITIES, TABLES, FORCED)
def test_the_same_arguments_give_the_same_decision(request, capabilities, table, forced):
    copies = (
        dataclasses.replace(request),
        dataclasses.replace(capabilities),
        Table(1, "", "", "", "", tuple(table.rows)),
        forced,
    )
    assert _decide(request, capabilities, table, forced) == _decide(*copies)


@given(REQUESTS, CAPABILITIES, TABLES, FORCED)
def test_every_algorithm_is_chosen_or_rejected_once_and_with_a_reason(request, capabilities, table, forced):
    decision = _decide(request, capabilities, table, forced)
    if isinstance(decision, str):
        return
    fallback = f"torch:{capabilities.backend(request.device) or 'none'}"
    direct = DIRECT_ALGORITHMS.get(request.op, ()) if request.symmetric else ()
    expected = [*(a.name for a in (*ALGORITHMS[FAMILIES[request.op]], *direct)), fallback]
    assert sorted([decision.algorithm, *dict(decision.rejected)]) == sorted(expected)
    assert len(decision.rejected) == len(expected) - 1
    assert decision.reason
    assert all(why for _, why in decision.rejected)
    assert str(decision).count("\n") == 1 + len(decision.rejected)


@given(REQUESTS, CAPABILITIES, TABLES, FORCED)
def test_what_is_chosen_can_do_it_and_is_what_was_forced(request, capabilities, table, forced):
    decision = _decide(request, capabilities, table, forced)
    if isinstance(decision, str):
        assert forced != "unheard_of" or "'unheard_of' is not known for" in decision
        return
    engine, _, algorithm = decision.algorithm.partition(":")
    assert forced in ("", engine, algorithm, decision.algorithm)
    if engine == "torch":
        assert dict(capabilities.torch_backends)[request.device] == algorithm
        return
    assert request.device == "cpu"
    assert not capabilities.no_shared_memory
    assert not (engine == "triton" and capabilities.no_kernels)
    known = next(a for a in ALGORITHMS[FAMILIES[request.op]] if a.name == decision.algorithm)
    assert known.refusal(request.reduce, request.dtype) == ""
    assert engine != "triton" or forced in ("triton", decision.algorithm)


@given(REQUESTS, CAPABILITIES, TABLES)
def test_only_what_is_chosen_lends_its_measurements_and_pieces(request, capabilities, table):
    decision = _decide(request, capabilities, table, "")
    if isinstance(decision, str) or not (decision.piece_nbytes or decision.measured_us):
        return
    row = table.pick(FAMILIES[request.op], decision.engine, request.world_size, request.nbytes)
    assert row.algorithm == decision.algorithm
    assert (row.piece_nbytes, tuple(row.measured_us.items())) == (decision.piece_nbytes, decision.measured_us)


def _request(**kwargs):
    fields = {"op": "all_reduce", "reduce": "sum", "dtype": torch.float32, "nbytes": 4096, "world_size": 2}
    return Request(**fields | kwargs)


def _table(*rows):
    return Table(1, "", "", "", "", rows)


MEASURED = {"cpu:two_shot": 30.0, "cpu:one_shot_pull": 50.5}


def test_a_decision_reads_like_a_sentence_for_each_algorithm():
    table = _table(
        Row("all_reduce", "cpu:two_shot", 8192, measured_us=MEASURED, measured_at="2 ranks, 8192 bytes")
    )
    assert str(choose(_request(), GLOO, table)).split("\n") == [
        "all_reduce sum float32, 4096 bytes on 2 ranks (cpu): cpu:two_shot",
        "  because the table says so up to 8192 bytes (2 ranks, 8192 bytes)",
        "  not cpu:one_shot_push: the table prefers another",
        "  not cpu:one_shot_pull: 50.5 us where cpu:two_shot took 30 us",
        *[
            f"  not {name}: interpreted kernels are for proof, not for speed; ask for them by name"
            for name in NAMES[3:]
        ],
        "  not torch:gloo: the table prefers another",
    ]


def test_without_a_row_the_first_that_can_is_taken():
    decision = choose(_request(), GLOO, NO_ROWS)
    assert decision.algorithm == "cpu:one_shot_push"
    assert decision.reason == "no row of the table covers it and it is the first that can"
    assert choose(_request(), GLOO, _table(Row("all_reduce", "cpu:x", None))).algorithm == "cpu:one_shot_push"


def test_a_forced_engine_is_tuned_by_the_table_and_a_forced_algorithm_is_not():
    table = _table(
        Row("all_reduce", "cpu:one_shot_pull", None, piece_nbytes=4096),
        Row("all_reduce", "triton:two_shot", None),
    )
    engine = choose(_request(), GLOO, table, "triton")
    assert engine.algorithm == "triton:two_shot"
    assert engine.reason == "'triton' was asked for by name; the table says so up to any number of bytes ()"
    exact = choose(_request(), GLOO, table, "cpu:two_shot")
    assert (exact.algorithm, exact.piece_nbytes) == ("cpu:two_shot", 0)
    assert exact.reason == "'cpu:two_shot' was asked for by name"
    assert dict(exact.rejected)["cpu:one_shot_pull"] == "'cpu:two_shot' was asked for"
    assert choose(_request(), GLOO, table, "two_shot").algorithm == "cpu:two_shot"
    assert choose(_request(), GLOO, table, "torch").algorithm == "torch:gloo"


def test_the_fallback_says_why_it_is_needed():
    decision = choose(_request(dtype=torch.uint8), GLOO, NO_ROWS)
    assert decision.algorithm == "torch:gloo"
    assert decision.reason == (
        "torch.uint8 is not among float32, float16, bfloat16, float64, int32, int64; "
        "torch.uint8 is not among float32, float16, bfloat16, int32"
    )
    assert choose(_request(device="cuda"), GLOO, NO_ROWS).algorithm == "torch:nccl"
    apart = dataclasses.replace(GLOO, no_shared_memory="rank 1 is on another host")
    decision = choose(_request(op="broadcast", reduce=""), apart, NO_ROWS)
    assert (decision.algorithm, decision.reason) == ("torch:gloo", "rank 1 is on another host")


def test_data_of_any_dtype_only_moves():
    for op in ("broadcast", "all_gatherv", "gather", "scatter", "all_to_all_single"):
        request = _request(op=op, reduce="", dtype=torch.float8_e4m3fn)
        assert choose(request, Capabilities(), NO_ROWS).algorithm == "cpu:pull"


def test_equal_and_unequal_parts_go_by_the_rows_of_one_family():
    table = _table(Row("all_gather", "cpu:push", None))
    for op in ("all_gather_single", "all_gatherv"):
        assert choose(_request(op=op, reduce=""), GLOO, table).algorithm == "cpu:push"
    assert choose(_request(op="gather", reduce=""), GLOO, table).algorithm == "cpu:pull"


def test_a_variable_asks_only_those_verbs_for_an_algorithm_that_have_it():
    assert asked_of("all_reduce", "cpu:two_shot") == "cpu:two_shot"
    assert asked_of("broadcast", "cpu:two_shot") == asked_of("barrier", "two_shot") == ""
    assert asked_of("all_gatherv", "push") == "push"
    for engine in (*ENGINES, "torch:gloo", "unheard_of", ""):
        assert asked_of("barrier", engine) == engine


def test_a_world_of_one_copies():
    decision = choose(_request(world_size=1), Capabilities(), NO_ROWS)
    assert (decision.algorithm, decision.engine, decision.rejected) == ("local:copy", "local", ())


@pytest.mark.parametrize(
    ("request_", "capabilities", "forced", "told"),
    [
        (
            _request(),
            GLOO,
            "nccl",
            "algorithm 'nccl' is not known for all_reduce; give one of cpu, triton, torch, "
            + ", ".join([*NAMES, "torch:gloo"]),
        ),
        (
            _request(),
            Capabilities(no_kernels="rank 1: Triton is not installed"),
            "triton:two_shot",
            "(triton:two_shot: rank 1: Triton is not installed)",
        ),
        (
            _request(dtype=torch.float64),
            GLOO,
            "triton:one_shot_ll",
            "cannot do all_reduce sum of torch.float64 "
            "(triton:one_shot_ll: torch.float64 is not among float32, float16, bfloat16, int32)",
        ),
        (
            _request(device="cuda"),
            Capabilities(),
            "torch",
            "there is no torch.distributed process group for cuda tensors behind this group",
        ),
        (_request(reduce="product"), Capabilities(), "", "nothing here can do all_reduce product of torch"),
    ],
)
def test_what_nothing_can_do_is_refused_with_every_reason(request_, capabilities, forced, told):
    with pytest.raises(CapabilityError) as caught:
        choose(request_, capabilities, NO_ROWS, forced)
    assert told in str(caught.value)


def test_a_decision_is_a_value():
    first, second = (choose(_request(), GLOO, NO_ROWS) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.algorithm = "other"
    assert isinstance(first, Decision)


SYMMETRIC = [
    Row("all_reduce", "cpu:one_shot_pull", 8192),
    Row("all_reduce", "cpu:two_shot", None),
    Row("all_reduce_symmetric", "cpu:one_shot_push", 4096),
    Row("all_reduce_symmetric", "cpu:two_shot_direct", None, max_ranks=4),
]


@pytest.mark.parametrize(
    ("nbytes", "world_size", "plain", "symmetric"),
    [
        (4096, 2, "cpu:one_shot_pull", "cpu:one_shot_pull"),
        (4097, 2, "cpu:one_shot_pull", "cpu:two_shot_direct"),
        (9000, 4, "cpu:two_shot", "cpu:two_shot_direct"),
        (9000, 5, "cpu:two_shot", "cpu:two_shot"),
    ],
)
def test_peers_write_to_symmetric_results_where_the_table_says_so_and_else_all_is_as_everywhere(
    nbytes, world_size, plain, symmetric
):
    table = _table(*SYMMETRIC)
    request = _request(nbytes=nbytes, world_size=world_size)
    assert choose(request, GLOO, table).algorithm == plain
    asked = dataclasses.replace(request, symmetric=True)
    assert choose(asked, GLOO, table).algorithm == symmetric
    assert choose(asked, GLOO, table, "cpu:two_shot").algorithm == "cpu:two_shot"
    assert choose(asked, GLOO, table, "two_shot_direct").algorithm == "cpu:two_shot_direct"
    with pytest.raises(CapabilityError, match="is no tensor of symmetric_empty"):
        choose(request, GLOO, table, "two_shot_direct")
    assert asked_of("all_reduce", "two_shot_direct") == "two_shot_direct"
    assert asked_of("broadcast", "two_shot_direct") == ""
