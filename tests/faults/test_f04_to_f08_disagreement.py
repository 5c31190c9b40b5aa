import pytest
import torch

from tests.faults.worlds import KINDS, failure_of, group, reduce_ones

LIMIT_SECONDS = 1.0


def _all_reduce(comm, kind, x, op="sum", algorithm=""):
    return comm.all_reduce(x, op, algorithm=algorithm or KINDS[kind])


def _barrier(comm, kind):
    comm.barrier()


def _broadcast(comm, kind, root=0):
    comm.broadcast(torch.ones(4), root)


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
}
NEEDS_TORCH = ("f05_broadcast", "f05_root")


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


def _check(results, odd, names):
    for rank, told in enumerate(results):
        for name in names:
            failure, (usual, unusual) = told[name], CASES[name][2]
            assert failure.kind == "CollectiveMismatchError", (name, failure)
            assert failure.seconds < LIMIT_SECONDS, (name, failure)
            lines = failure.text.splitlines()
            table = {int(line.split()[1][:-1]): line for line in lines if line.startswith("  rank ")}
            assert sorted(table) == list(range(len(results))), (name, failure.text)
            for peer, line in table.items():
                assert (unusual if peer == odd else usual) in line, (name, failure.text)
            others = [peer for peer in table if (peer == odd) != (rank == odd)]
            assert (failure.rank, failure.peers) == (rank, tuple(others)), (name, failure)
            assert failure.seq > 0
            assert failure.op in lines[1 + rank]


def _names(kind):
    left_out = set()
    if kind not in ("torch", "remote"):
        left_out.update(NEEDS_TORCH)
    if kind == "remote":
        left_out.add("f08_algorithm")
    return [name for name in CASES if name not in left_out]


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in KINDS for name in _names(kind) if kind != "triton"]
)
def test_f04_to_f08_the_first_collectives_differ(world, kind, name):
    odd = 1
    _check(world(2, _disagree, kind, odd, [name]), odd, [name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world_size", "odd"), [(2, 0), (3, 0), (3, 2)])
def test_f04_to_f08_one_disagreement_after_another(world, kind, world_size, odd):
    names = _names(kind)
    _check(world(world_size, _disagree, kind, odd, names), odd, names)
