import msgspec
import pytest
import torch

from tcomm.algorithms import ALGORITHMS, FAMILIES, GPU_ALGORITHMS
from tcomm.errors import CapabilityError
from tcomm.memory.control import MAX_WORLD_SIZE
from tcomm.presets import named_reports, named_topology
from tcomm.topology import vote
from tcomm.tuning.choose import Capabilities, asked_of, choose, make_request
from tcomm.tuning.decision import decode_decisions, encode_decisions
from tcomm.tuning.table import Row, Table

NO_ROWS = Table(1, "", "", "", "", ())
BACKENDS = (("cpu", "gloo"), ("cuda", "nccl"))
LOADS = ("one_shot_ll", "one_shot_push", "one_shot_pull", "two_shot")
MULTIMEM = ("multimem_one_shot", "multimem_two_shot")


def _decide(topology, verb="all_reduce", nbytes=4096, forced="", table=NO_ROWS, **kwargs):
    topology = named_topology(topology) if isinstance(topology, str) else topology
    options = {"op": "sum", "dtype": torch.bfloat16} | kwargs
    deterministic = options.pop("deterministic", False)
    request = make_request(
        verb, options["op"], options["dtype"], nbytes, topology.world_size, "cuda", deterministic
    )
    return choose(request, Capabilities(torch_backends=BACKENDS, topology=topology), table, forced)


def _changed(name="h100x8", **changes):
    return msgspec.structs.replace(named_topology(name), **changes)


def _possible(decision):
    """Names that could be used: the chosen, and those that the model only finds slower."""
    refused = {name for name, why in decision.rejected if not why.startswith("model: ")}
    names = {decision.algorithm, *dict(decision.rejected)} - refused
    return {name.partition(":")[2] for name in names if name.startswith("triton:")}


@pytest.mark.parametrize(
    ("topology", "possible"),
    [
        ("h100x8", {*LOADS, *MULTIMEM}),
        ("b200x8", {*LOADS, *MULTIMEM}),
        ("gb200x16", {*LOADS, *MULTIMEM}),
        ("h100x8-no-multicast", set(LOADS)),
        ("a100x8", set(LOADS)),
        ("pcie2", set(LOADS)),
        ("mixed", set(LOADS)),
        ("2xh100x8", {"hierarchical"}),
        ("v100x4", set()),
        ("gb200x72", set()),
    ],
)
def test_each_topology_has_its_all_reduces(topology, possible):
    assert _possible(_decide(topology)) == possible


@pytest.mark.parametrize(
    ("verb", "topology", "possible"),
    [
        ("all_gather_single", "h100x8", {"push", "pull", "multimem"}),
        ("all_gatherv", "h100x8-no-multicast", {"push", "pull"}),
        ("all_gather_single", "2xh100x4", {"hierarchical"}),
        ("all_gatherv", "2xh100x4", set()),
        ("reduce_scatter_single", "h100x8", {"push", "pull", "multimem"}),
        ("reduce_scatter_single", "2xh100x4", set()),
        ("broadcast", "h100x8", {"push", "pull"}),
        ("barrier", "h100x8", {"arrival"}),
        ("send", "pcie2", {"mailbox"}),
    ],
)
def test_the_other_verbs_have_theirs(verb, topology, possible):
    assert _possible(_decide(topology, verb)) == possible


@pytest.mark.parametrize(
    ("topology", "algorithm", "told"),
    [
        ("h100x8-no-multicast", "multimem_two_shot", "no multicast: ranks 0 to 7: switched off"),
        ("a100x8", "multimem_two_shot", "it needs sm_90 or later on every rank, and the weakest is sm_80"),
        ("v100x4", "two_shot", "it needs sm_80 or later on every rank, and the weakest is sm_70"),
        ("2xh100x8", "two_shot", "it reaches over one node, and the ranks are on 2"),
        ("h100x8", "hierarchical", "it goes between nodes, and all ranks are on one"),
        ("gb200x72", "one_shot_push", f"72 ranks; a control page has room for {MAX_WORLD_SIZE}"),
        ("h100x8", "cpu:two_shot", "it works on host memory, and the tensors are on cuda"),
        (_changed(no_peer_access="rank 1: no P2P"), "two_shot", "two_shot: rank 1: no P2P"),
        (_changed(no_peer_access="rank 1: no P2P"), "multimem_one_shot", "rank 1: no P2P"),
        (_changed(no_kernels="rank 3: no Triton"), "two_shot", "rank 3: no Triton"),
        (_changed(no_symmetric_memory="rank 2: too old"), "two_shot", "rank 2: too old"),
        (
            _changed(shares_device="ranks 0 and 1 share X"),
            "multimem_one_shot",
            "no multicast: ranks 0 and 1 s",
        ),
        (
            _changed(shares_device="ranks 0 and 1 share X"),
            "torch",
            "ranks 0 and 1 share X, which NCCL refuses",
        ),
        (
            _changed("2xh100x8", no_nvshmem="rank 9: not there"),
            "hierarchical",
            "no NVSHMEM: rank 9: not there",
        ),
        (
            _changed(nodes=(0,) * 6 + (1,) * 2),
            "hierarchical",
            "it needs as many ranks on every node, and the",
        ),
        (
            _changed(arch="gfx942"),
            "multimem_one_shot",
            "it needs sm_90 or later on every rank, and the weakest",
        ),
    ],
)
def test_what_gpus_lack_is_told(topology, algorithm, told):
    with pytest.raises(CapabilityError) as caught:
        _decide(topology, forced=algorithm)
    assert told in str(caught.value)


def test_other_makers_gpus_run_what_only_loads_and_stores():
    assert _possible(_decide(_changed(arch="gfx942", no_multicast="ranks 0 to 7: AMD"))) == set(LOADS)


def test_a_topology_of_another_world_is_not_gone_by():
    request = make_request("all_reduce", "sum", torch.float32, 64, 4, "cuda")
    capabilities = Capabilities(torch_backends=BACKENDS, topology=named_topology("h100x8"))
    decision = choose(request, capabilities, NO_ROWS)
    assert decision.algorithm == "torch:nccl"
    assert decision.reason == "the topology is that of 8 ranks, and 4 take part"


@pytest.mark.parametrize(
    ("kwargs", "refused"),
    [
        ({"op": "max"}, {*MULTIMEM}),
        ({"op": "avg"}, {*MULTIMEM}),
        ({"dtype": torch.float64}, {*MULTIMEM, "one_shot_ll"}),
        ({"dtype": torch.int32}, {*MULTIMEM}),
        ({"dtype": torch.uint8}, {*MULTIMEM, *LOADS}),
        ({"deterministic": True}, {*MULTIMEM}),
        ({}, set()),
    ],
)
def test_operations_and_types_are_each_algorithms_own(kwargs, refused):
    assert {*LOADS, *MULTIMEM} - _possible(_decide("h100x8", **kwargs)) == refused


def test_a_decision_says_what_was_asked_of_it():
    plain, strict = (str(_decide("h100x8", deterministic=wanted)) for wanted in (False, True))
    assert plain.startswith("all_reduce sum bfloat16, 4096 bytes on 8 ranks (cuda): triton:one_shot_ll\n")
    assert strict.startswith("all_reduce sum bfloat16, 4096 bytes on 8 ranks (cuda, deterministic): triton:")
    assert "  because model, not a measurement: 3.7 us against 4.6 us of triton:one_shot_push\n" in plain


def test_deterministic_results_leave_out_what_adds_in_an_order_of_its_own():
    for nbytes in (1 << 10, 1 << 20, 1 << 28):
        decision = _decide("h100x8", nbytes=nbytes, deterministic=True)
        rejected = dict(decision.rejected)
        assert decision.algorithm in {f"triton:{name}" for name in LOADS}
        assert rejected["triton:multimem_two_shot"] == (
            "the switch adds in an order of its own, and deterministic results were asked for"
        )
        assert rejected["torch:nccl"] == (
            "it promises no order of adding, and deterministic results were asked for"
        )
    assert "multimem" in _possible(_decide("h100x8", "all_gather_single", deterministic=True))
    assert _decide("v100x4", deterministic=True).algorithm == "torch:nccl"
    assert _decide("h100x8", forced="torch", deterministic=True).algorithm == "torch:nccl"


def test_a_choice_by_the_model_says_so_with_both_times():
    decision = _decide("h100x8", nbytes=64 << 10)
    assert decision.algorithm == "triton:one_shot_push"
    assert decision.reason == "model, not a measurement: 5.8 us against 6.0 us of triton:one_shot_ll"
    assert (
        dict(decision.rejected)["triton:two_shot"] == "model: 6.8 us against 5.8 us of triton:one_shot_push"
    )
    assert decision.microseconds == pytest.approx(5.774)
    assert decision.measured_us == ()
    assert set(dict(decision.predicted_us)) == {"torch:nccl", *(f"triton:{n}" for n in (*LOADS, *MULTIMEM))}
    assert _decide("h100x8", nbytes=128 << 20).algorithm == "torch:nccl"
    forced = _decide("h100x8", nbytes=64 << 10, forced="multimem_two_shot")
    assert (forced.algorithm, forced.reason) == (
        "triton:multimem_two_shot", "'multimem_two_shot' was asked for by name",
    )  # fmt: skip


def test_a_fallback_to_nccl_says_what_the_kernels_lack():
    assert _decide("gb200x72").reason == "72 ranks; a control page has room for 16"
    assert _decide("h100x8", dtype=torch.uint8).reason.startswith("torch.uint8 is not among float32")
    decision = _decide(_changed(no_kernels="rank 3: no Triton"))
    assert (decision.algorithm, decision.reason) == ("torch:nccl", "rank 3: no Triton")


def test_a_reason_is_what_the_vote_found():
    reports = named_reports("h100x8")
    reports[5] = msgspec.structs.replace(reports[5], no_multicast="the driver says no")
    decision = _decide(vote(reports), nbytes=1 << 20)
    assert decision.algorithm == "triton:two_shot"
    assert dict(decision.rejected)["triton:multimem_two_shot"] == "no multicast: rank 5: the driver says no"


MEASURED = {"triton:multimem_two_shot": 9.0, "triton:two_shot": 12.0, "torch:nccl": 20.0}
ROW = Row("all_reduce", "triton:multimem_two_shot", 8 << 20, measured_us=MEASURED, measured_at="8 ranks",
          device="h100")  # fmt: skip


def test_a_measurement_on_that_kind_of_gpu_comes_before_the_model():
    host = Row("all_reduce", "cpu:two_shot", None)
    table = Table(1, "", "", "", "", (host, ROW))
    decision = _decide("h100x8", table=table)
    assert decision.algorithm == "triton:multimem_two_shot"
    assert decision.reason == "the table says so up to 8388608 bytes (8 ranks)"
    assert (decision.microseconds, decision.predicted_us) == (9.0, ())
    assert dict(decision.rejected)["torch:nccl"] == "20 us where triton:multimem_two_shot took 9 us"
    for elsewhere in ("b200x8", "h200x8"):
        assert _decide(elsewhere, table=table).reason.startswith("model")
    assert _decide("h100x8", table=table, nbytes=16 << 20).reason.startswith("model")
    cpu = choose(make_request("all_reduce", "sum", torch.float32, 64, 8), Capabilities(), table)
    assert cpu.algorithm == "cpu:two_shot"


def test_where_the_tables_best_cannot_be_used_its_next_best_is():
    table = Table(1, "", "", "", "", (ROW,))
    decision = _decide("h100x8-no-multicast", table=table)
    assert decision.algorithm == "triton:two_shot"
    assert decision.reason == "the table's triton:multimem_two_shot cannot be used, and it is the next best"
    assert decision.piece_nbytes == 0
    faster = msgspec.structs.replace(ROW, algorithm="torch:nccl")
    assert _decide("h100x8", table=Table(1, "", "", "", "", (faster,))).algorithm == "torch:nccl"


def test_another_backend_is_no_nccl():
    request = make_request("all_reduce", "sum", torch.float32, 1 << 28, 8, "cuda")
    capabilities = Capabilities(torch_backends=(("cuda", "gloo"),), topology=named_topology("h100x8"))
    decision = choose(request, capabilities, NO_ROWS)
    assert decision.algorithm == "triton:multimem_two_shot"
    assert dict(decision.rejected)["torch:gloo"].startswith("model: it knows nothing of it")


def test_on_host_memory_they_are_refused_when_named_and_else_not_spoken_of():
    assert all("multimem" not in name for name, _ in choose(
        make_request("all_reduce", "sum", torch.float32, 64, 4), Capabilities(), NO_ROWS
    ).rejected)  # fmt: skip
    for family, algorithms in GPU_ALGORITHMS.items():
        verb = next(verb for verb in FAMILIES if FAMILIES[verb] == family)
        for algorithm in algorithms:
            for forced in (algorithm.name, algorithm.name.partition(":")[2]):
                with pytest.raises(CapabilityError) as caught:
                    choose(make_request(verb, "sum", torch.float32, 64, 4), Capabilities(), NO_ROWS, forced)
                assert f"({algorithm.name}: its kernels need a GPU: " in str(caught.value)


def test_a_variable_may_name_what_only_gpus_do():
    assert asked_of("all_reduce", "multimem_two_shot") == "multimem_two_shot"
    assert asked_of("all_gatherv", "triton:multimem") == "triton:multimem"
    assert asked_of("broadcast", "multimem") == asked_of("all_reduce", "multimem") == ""


def test_names_are_unique_within_a_family():
    for family, algorithms in GPU_ALGORITHMS.items():
        names = [a.name for a in (*ALGORITHMS[family], *algorithms)]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("topology", ["h100x8", "2xh100x8", "pcie2", "gb200x72"])
def test_decisions_come_back_from_their_json(topology):
    decisions = [_decide(topology, nbytes=nbytes) for nbytes in (0, 4096, 1 << 28)]
    decisions.append(_decide(topology, "barrier"))
    assert decode_decisions(encode_decisions(decisions)) == decisions


def test_between_nodes_ranks_follow_one_another():
    told = {
        (0, 1, 0, 1, 0, 1, 0, 1): "the ranks are on nodes (0, 1, 0, 1, 0, 1, 0, 1)",
        (0, 0, 0, 1, 1, 1, 1, 1): "it needs as many ranks on every node",
    }
    for nodes, reason in told.items():
        decision = _decide(_changed("2xh100x4", nodes=nodes))
        assert reason in dict(decision.rejected)["triton:hierarchical"]
