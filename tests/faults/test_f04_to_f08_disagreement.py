import pytest
import torch

from tests.faults.worlds import KINDS, failure_of, group, reduce_ones

LIMIT_SECONDS = 1.0


def _all_reduce(comm, kind, x, op="sum", algorithm=""):
    return comm.all_reduce(x, op, algorithm=algorithm or KINDS[kind])


def _barrier(comm, kind):
    comm.barrier()


def _broadcast(comm, kind, root=0):
    comm.broadcast(torch.ones(4), root, algorithm=KINDS[kind])


def _verb(comm, kind, name, *args):
    """Arguments may be functions of the communicator, where they have to fit rank or world."""
    args = [arg(comm) if callable(arg) else arg for arg in args]
    *args, options = args if isinstance(args[-1], dict) else (*args, {})
    getattr(comm, name)(*args, algorithm=KINDS[kind], **options)


def _whole(comm):
    """Divides by worlds of 2 and 3, along both dimensions."""
    return torch.ones(6, 6)


def _rows_but_one(comm):
    """Sizes of ranks, of which only the first has two."""
    return [2, *[1] * (comm.world_size - 1)]


def _ones(comm):
    return [1] * comm.world_size


def _six(comm):
    """Splits of six rows that are not equal."""
    return [7 - comm.world_size, *[1] * (comm.world_size - 1)]


def _for_sizes(comm):
    return torch.ones(sum(_rows_but_one(comm)), 2)


def _prepare(comm, kind):
    comm.prepare(1 << 16)


def _x(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


OTHER_ALGORITHM = {"cpu": "triton", "triton": "cpu", "torch": "cpu"}

CASES = {
    "f04_next": ((_all_reduce, _x(4)), (_barrier,), ("all_reduce float32 [4] sum via", "barrier")),
    "f05_barrier": ((_barrier,), (_all_reduce, _x(4)), ("barrier", "all_reduce float32 [4] sum via")),
    "f05_prepare": ((_prepare,), (_all_reduce, _x(4)), ("prepare", "all_reduce float32 [4] sum via")),
    "f05_broadcast": ((_broadcast,), (_all_reduce, _x(4)), ("broadcast float32 [4] root=0", "all_reduce")),
    "f05_root": ((_broadcast, 0), (_broadcast, 1), ("float32 [4] root=0", "float32 [4] root=1")),
    "f06_numel": ((_all_reduce, _x(4)), (_all_reduce, _x(5)), ("float32 [4]", "float32 [5]")),
    "f06_view": ((_all_reduce, _x(2, 3)), (_all_reduce, _x(3, 2)), ("float32 [2, 3]", "float32 [3, 2]")),
    "f06_empty": ((_all_reduce, _x(0, 3)), (_all_reduce, _x(1)), ("float32 [0, 3]", "float32 [1]")),
    "f06_0d": ((_all_reduce, _x()), (_all_reduce, _x(1)), ("float32 []", "float32 [1]")),
    "f06_pieces": ((_all_reduce, _x(200_000)), (_all_reduce, _x(9)), ("float32 [200000]", "float32 [9]")),
    "f07_size": (
        (_all_reduce, _x(4)),
        (_all_reduce, _x(4, dtype=torch.float64)),
        ("float32 [4]", "float64 [4]"),
    ),
    "f07_kind": (
        (_all_reduce, _x(4)),
        (_all_reduce, _x(4, dtype=torch.int32)),
        ("float32 [4]", "int32 [4]"),
    ),
    "f08_reduce_op": ((_all_reduce, _x(4)), (_all_reduce, _x(4), "max"), ("[4] sum", "[4] max")),
    "f08_algorithm": (
        (_all_reduce, _x(4)),
        (_all_reduce, _x(4), "sum", "other"),
        ("via", "via"),
    ),
    "f05_gather": (
        (_verb, "gather", _x(6), 0),
        (_verb, "all_gather_single", _x(6)),
        (" gather float32 [6] root=0", " all_gather_single float32 [6]"),
    ),
    "f05_root_of_reduce": (
        (_verb, "reduce", _x(6), 0),
        (_verb, "reduce", _x(6), 1),
        ("reduce float32 [6] sum root=0", "reduce float32 [6] sum root=1"),
    ),
    "f05_root_of_scatter": (
        (_verb, "scatter", _whole, 1),
        (_verb, "scatter", _whole, 0),
        ("scatter float32 [6, 6] root=1", "scatter float32 [6, 6] root=0"),
    ),
    "f06_dim": (
        (_verb, "all_gather_single", _whole),
        (_verb, "all_gather_single", _whole, {"dim": -1}),
        ("all_gather_single float32 [6, 6]", "all_gather_single float32 [6, 6] dim=1"),
    ),
    "f06_dim_of_reduce_scatter": (
        (_verb, "reduce_scatter_single", _whole, {"dim": 1}),
        (_verb, "reduce_scatter_single", _whole),
        ("float32 [6, 6] sum dim=1", "float32 [6, 6] sum"),
    ),
    "f06_sizes": (
        (_verb, "reduce_scatterv", _for_sizes, _rows_but_one),
        (_verb, "reduce_scatterv", _for_sizes, lambda comm: _rows_but_one(comm)[::-1]),
        ("sum sizes=[2, ", "1, 2]"),
    ),
    "f06_columns": (
        (_verb, "all_to_all_single", _whole, _six),
        (_verb, "all_to_all_single", lambda comm: torch.ones(6, 3), _six),
        ("all_to_all_single float32 [6] send=", "all_to_all_single float32 [3] send="),
    ),
    "f06_splits_or_not": (
        (_verb, "all_to_all_single", _whole),
        (_verb, "all_to_all_single", _whole, _six),
        ("all_to_all_single float32 [6, 6]", "all_to_all_single float32 [6] send="),
    ),
    "f06_sizes_or_not": (
        (_verb, "all_gatherv", _x(1, 2), _ones),
        (_verb, "all_gatherv", _x(1, 2)),
        (", 2] sizes=[1, 1", "all_gatherv of float32 [-1, 2]"),
    ),
    "f07_moved": (
        (_verb, "all_to_all_single", _x(6, dtype=torch.int8)),
        (_verb, "all_to_all_single", _x(6, dtype=torch.uint8)),
        (" int8 [6]", " uint8 [6]"),
    ),
    "f07_float8": (
        (_verb, "gather", _x(6).to(torch.float8_e4m3fn), 1),
        (_verb, "gather", _x(6).to(torch.float8_e5m2), 1),
        ("float8_e4m3fn [6]", "float8_e5m2 [6]"),
    ),
    "f08_reduce_of_reduce": (
        (_verb, "reduce", _x(6), 1, "max"),
        (_verb, "reduce", _x(6), 1, "min"),
        ("[6] max root=1", "[6] min root=1"),
    ),
}


def _disagree(member, kind, odd, names):
    told = {}
    with group(member, kind) as comm:
        for name in names:
            usual, unusual, _ = CASES[name]
            call, *args = unusual if member.rank == odd else usual
            args = [OTHER_ALGORITHM[kind] if arg == "other" else arg for arg in args]
            told[name] = failure_of(call, comm, kind, *args)
            reduce_ones(comm, kind)
            comm.barrier()
    return told


def _check_case(results, odd, name):
    for rank, told in enumerate(results):
        failure, (usual, unusual) = told[name], CASES[name][2]
        assert failure.kind == "CollectiveMismatchError", (name, failure)
        assert failure.seconds < LIMIT_SECONDS, (name, failure)
        lines = [line for line in failure.text.splitlines() if line.startswith("  rank ")]
        assert len(lines) == len(results), (name, failure.text)
        for peer, line in enumerate(lines):
            assert line.startswith(f"  rank {peer}: "), (name, failure.text)
            assert (unusual if peer == odd else usual) in line, (name, failure.text)
        others = [peer for peer in range(len(results)) if (peer == odd) != (rank == odd)]
        assert (failure.rank, failure.peers) == (rank, tuple(others)), (name, failure)
        assert failure.seq > 0
        assert failure.op in lines[rank]


def _names(kind):
    return [name for name in CASES if kind != "remote" or name != "f08_algorithm"]


WORLDS = (
    [(kind, 2, 0) for kind in KINDS] + [(kind, 3, 2) for kind in KINDS] + [("cpu", 3, 0), ("torch", 3, 1)]
)


@pytest.fixture(scope="module", params=WORLDS, ids=lambda p: f"{p[0]}-{p[1]}-odd{p[2]}")
def disagreements(request, module_world):
    """What every rank was told in every case, one after another in one group."""
    kind, world_size, odd = request.param
    return module_world(world_size, _disagree, kind, odd, _names(kind)), odd


def _check(disagreements, number):
    results, odd = disagreements
    names = [name for name in results[0] if name.startswith(number)]
    assert names
    for name in names:
        _check_case(results, odd, name)


def test_f04_a_skipped_collective_is_told_at_the_next(disagreements):
    _check(disagreements, "f04")


def test_f05_different_verbs_are_told_apart(disagreements):
    _check(disagreements, "f05")


def test_f06_different_shapes_are_told_apart(disagreements):
    _check(disagreements, "f06")


def test_f07_different_dtypes_are_told_apart(disagreements):
    _check(disagreements, "f07")


def test_f08_different_reductions_and_algorithms_are_told_apart(disagreements):
    _check(disagreements, "f08")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("cpu", "f04_next"),
        ("cpu", "f06_numel"),
        ("cpu", "f08_algorithm"),
        ("triton", "f07_size"),
        ("torch", "f08_algorithm"),
        ("cpu", "f05_root_of_scatter"),
        ("torch", "f06_dim"),
        ("remote", "f06_numel"),
    ],
)
def test_f04_to_f08_the_very_first_collectives_differ(world, kind, name):
    _check_case(world(2, _disagree, kind, 1, [name]), 1, name)


def _skip_and_stay(member, signals):
    with group(member, timeout=20.0) as comm:
        reduce_ones(comm)
        if member.rank == 1:
            signals.wait_for("failed")
            return failure_of(comm.barrier)
        failure = failure_of(reduce_ones, comm, timeout=1.0)
        signals.show("failed")
        return failure


def test_f04_a_skipped_collective_that_none_follows_names_who_is_missing(world, signals):
    failure, told = world(2, _skip_and_stay, signals)
    assert (failure.kind, failure.peers, failure.rank) == ("PeerTimeoutError", (1,), 0)
    assert 0.9 < failure.seconds < 2.0
    assert "rank 1 is silent (pid " in failure.text
    assert "; it has completed call #2)" in failure.text
    assert told.kind == "PeerTimeoutError"
