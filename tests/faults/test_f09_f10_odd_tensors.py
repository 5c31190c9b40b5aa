import pytest
import torch

import tcomm
from tests.faults.worlds import KINDS, failure_of, group, reduce_ones

SHARED = ["cpu", "triton", "torch"]


def _strided(numel):
    """Tensors of 24 or fewer elements that are not contiguous, all with values from `numel` on."""
    base = torch.arange(float(numel), float(numel) + 48.0)
    return {
        "transposed": base[:24].view(4, 6).t(),
        "every second": base[::2],
        "columns": base.view(6, 8)[:, 2:5],
        "expanded": base[:4].view(4, 1).expand(4, 6),
        "expanded scalar": base[3].expand(5),
        "permuted": base[:24].view(2, 3, 4).permute(2, 0, 1),
    }


def _outs(shape):
    """Memory for a result of `shape` that is contiguous, transposed and with gaps."""
    yield torch.zeros(shape)
    yield torch.zeros(tuple(reversed(shape))).permute(*reversed(range(len(shape))))
    yield torch.zeros(*shape, 2)[..., 1]


def _reduce_strided(member, kind):
    with group(member, kind) as comm:
        every = [_strided(100 * rank) for rank in range(member.world_size)]
        for name, x in _strided(100 * member.rank).items():
            expected = torch.stack([theirs[name] for theirs in every]).sum(0)
            before = x.clone()
            assert torch.equal(comm.all_reduce(x, algorithm=KINDS[kind]), expected), name
            for out in _outs(x.shape):
                around = out.stride()
                assert comm.all_reduce(x, out=out, algorithm=KINDS[kind]) is out
                assert torch.equal(out, expected), (name, around)
            assert torch.equal(x, before), name
        x = _strided(100 * member.rank)["transposed"].clone(memory_format=torch.preserve_format)
        comm.all_reduce(x, out=x, algorithm=KINDS[kind])
        assert torch.equal(x, sum(theirs["transposed"] for theirs in every))


@pytest.mark.parametrize(("kind", "world_size"), [("cpu", 2), ("cpu", 3), ("triton", 2), ("torch", 2)])
def test_f09_strided_tensors_are_reduced_by_their_values(world, kind, world_size):
    world(world_size, _reduce_strided, kind)


def _gap_is_kept(member, kind):
    with group(member, kind) as comm:
        frame = torch.full((4, 8), -1.0)
        out = frame[1:3, 2:6]
        comm.all_reduce(torch.ones(2, 4), out=out, algorithm=KINDS[kind])
        frame[1:3, 2:6] -= member.world_size + 1
        assert torch.equal(frame, torch.full((4, 8), -1.0))


@pytest.mark.parametrize("kind", SHARED)
def test_f09_nothing_is_written_between_the_elements_of_out(world, kind):
    world(2, _gap_is_kept, kind)


def _move_strided(member, kind):
    with group(member, kind) as comm:
        how = {"algorithm": KINDS[kind]}
        rank, size = member.rank, member.world_size
        base = torch.arange(48.0) + 100 * rank
        x = base.view(6, 8)[:, ::2]
        of = [(torch.arange(48.0) + 100 * r).view(6, 8)[:, ::2] for r in range(size)]
        out = torch.zeros(4, 6).t()
        assert torch.equal(comm.broadcast(x, 1, out=out, **how), of[1])
        gathered = comm.all_gather_single(x, out=torch.zeros(4, 6 * size).t(), **how)
        assert torch.equal(gathered, torch.cat(of))
        scattered = comm.reduce_scatter_single(x, out=torch.zeros(4, 6 // size).t(), **how)
        assert torch.equal(scattered, sum(of).tensor_split(size)[rank])
        exchanged = comm.all_to_all_single(x, out=torch.zeros(4, 6).t(), **how)
        assert torch.equal(exchanged, torch.cat([theirs.tensor_split(size)[rank] for theirs in of]))
        if kind != "torch":
            return
        if rank == 0:
            comm.send(x, 1)
        else:
            received = torch.zeros(4, 6).t()
            assert torch.equal(comm.recv(received, 0), of[0])
            assert torch.equal(received, of[0])


@pytest.mark.parametrize("kind", SHARED)
def test_f09_strided_tensors_are_moved_by_their_values(world, kind):
    world(2, _move_strided, kind)


def _overlapping(member, kind):
    with group(member, kind) as comm:
        algorithm = KINDS[kind]
        seen = []
        for _ in range(2):
            base = torch.arange(16.0)
            x, out = base[::2], base[8:]
            seen.append(failure_of(comm.all_reduce, x, out=out, algorithm=algorithm))
            seen.append(failure_of(comm.all_reduce, base[:8], out=base[4:12], algorithm=algorithm))
            expanded = torch.zeros(1).expand(8)
            seen.append(failure_of(comm.all_reduce, torch.ones(8), out=expanded, algorithm=algorithm))
            assert torch.equal(base, torch.arange(16.0))
            reduce_ones(comm, kind, numel=8)
        return seen


@pytest.mark.parametrize("kind", ["cpu", "torch"])
def test_f09_an_out_that_cannot_hold_the_result_is_refused_before_anything_is_sent(world, kind):
    for seen in world(2, _overlapping, kind):
        assert [failure.kind for failure in seen] == ["ConfigError"] * len(seen), seen


EMPTY = [(0,), (0, 3), (3, 0, 2)]


def _reduce_nothing(member, kind):
    with group(member, kind) as comm:
        for shape in EMPTY:
            for op in ("sum", "avg", "max"):
                out = comm.all_reduce(torch.empty(shape), op, algorithm=KINDS[kind])
                assert tuple(out.shape) == shape
            held = torch.empty(shape)
            assert comm.all_reduce(held, out=held, algorithm=KINDS[kind]) is held
        reduce_ones(comm, kind)


@pytest.mark.parametrize(
    ("kind", "world_size"), [("cpu", 1), ("cpu", 2), ("cpu", 3), ("triton", 2), ("torch", 2)]
)
def test_f10_a_tensor_without_elements_is_reduced_to_itself(world, kind, world_size):
    world(world_size, _reduce_nothing, kind)


def _reduce_scalar(member, kind):
    with group(member, kind) as comm:
        x = torch.tensor(float(member.rank) + 1)
        expected = torch.tensor(sum(range(1, member.world_size + 1), 0.0))
        for algorithm in (
            ("cpu:one_shot_push", "cpu:one_shot_pull", "cpu:two_shot") if kind == "cpu" else (kind,)
        ):
            out = comm.all_reduce(x, algorithm=algorithm)
            assert out.shape == ()
            assert torch.equal(out, expected)
        held = x.clone()
        comm.all_reduce(held, out=held, algorithm=KINDS[kind])
        assert torch.equal(held, expected)
        assert comm.all_reduce(x, "max", algorithm=KINDS[kind]).item() == member.world_size


@pytest.mark.parametrize(("kind", "world_size"), [("cpu", 2), ("cpu", 3), ("triton", 2), ("torch", 2)])
def test_f10_a_tensor_without_dimensions_is_reduced(world, kind, world_size):
    world(world_size, _reduce_scalar, kind)


def _move_nothing(member, kind):
    with group(member, kind) as comm:
        how = {"algorithm": KINDS[kind]}
        nothing = torch.empty(0, 3)
        assert comm.broadcast(nothing, 0, **how).shape == (0, 3)
        assert comm.all_gather_single(nothing, **how).shape == (0, 3)
        assert comm.reduce_scatter_single(nothing, **how).shape == (0, 3)
        assert comm.all_to_all_single(nothing, **how).shape == (0, 3)
        x = torch.full((1, 2), float(member.rank))
        recvs = [1, 1] if member.rank == 0 else [0, 0]
        out = comm.all_to_all_single(x, [1, 0], recvs, **how)
        assert torch.equal(
            out, torch.tensor([[0.0, 0.0], [1.0, 1.0]]) if member.rank == 0 else torch.empty(0, 2)
        )
        scalar = torch.tensor(float(member.rank))
        assert torch.equal(comm.broadcast(scalar, 1, **how), torch.tensor(1.0))
        reduce_ones(comm, kind)


@pytest.mark.parametrize("kind", [*SHARED, "remote"])
def test_f10_tensors_without_elements_are_moved(world, kind):
    world(2, _move_nothing, kind)


@pytest.fixture
def alone():
    with tcomm.Communicator(name="alone") as comm:
        yield comm


@pytest.mark.parametrize("op", ["sum", "avg", "max", "min"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 4), (200, 300)])
def test_f10_a_world_of_one_gets_its_input_back(alone, op, shape):
    x = torch.randn(shape)
    out = alone.all_reduce(x, op)
    assert torch.equal(out, x)
    assert out.data_ptr() != x.data_ptr() or x.numel() == 0
    assert alone.all_reduce(x, op, out=x) is x
    assert torch.equal(alone.all_reduce(x.t() if x.dim() == 2 else x, op), x.t() if x.dim() == 2 else x)


def _coalesced(comm, x):
    with comm.coalescing() as batch:
        first, second = batch.all_reduce(x), batch.all_reduce(2 * x)
    return second - first


VERBS = {
    "all_reduce": lambda comm, x: comm.all_reduce(x),
    "all_reduce strided": lambda comm, x: comm.all_reduce(x.t()).t(),
    "broadcast": lambda comm, x: comm.broadcast(x, 0),
    "all_gather_single": lambda comm, x: comm.all_gather_single(x),
    "reduce_scatter_single": lambda comm, x: comm.reduce_scatter_single(x),
    "all_to_all_single": lambda comm, x: comm.all_to_all_single(x),
    "all_to_all_single ragged": lambda comm, x: comm.all_to_all_single(x, [len(x)]),
    "reduce": lambda comm, x: comm.reduce(x, 0),
    "reduce_scatter_single dim": lambda comm, x: comm.reduce_scatter_single(x, dim=1),
    "reduce_scatterv": lambda comm, x: comm.reduce_scatterv(x, [len(x)]),
    "reduce_scatterv list": lambda comm, x: comm.reduce_scatterv([x, 2 * x], [len(x)])[0],
    "gather": lambda comm, x: comm.gather(x, 0, dim=-1),
    "scatter": lambda comm, x: comm.scatter(x, 0),
    "all_gatherv": lambda comm, x: comm.all_gatherv(x),
    "all_gatherv list": lambda comm, x: comm.all_gatherv([x, 2 * x], [len(x)])[0],
    "coalescing": _coalesced,
    "async": lambda comm, x: comm.all_reduce(x, async_op=True).wait(),
}


@pytest.mark.parametrize("shape", [(3, 4), (200, 300)])
@pytest.mark.parametrize("verb", VERBS)
def test_f10_the_gradient_flows_through_a_world_of_one(alone, verb, shape):
    for _ in range(2):
        x = torch.randn(shape, requires_grad=True)
        out = VERBS[verb](alone, x * 2)
        assert torch.equal(out, x * 2)
        weights = torch.randn(shape)
        (out * weights).sum().backward()
        assert torch.equal(x.grad, 2 * weights)


def _would_lose_the_gradient(member, kind):
    with group(member, kind) as comm:
        x = torch.ones(4, requires_grad=True)
        lost = [failure_of(comm.all_reduce, x, algorithm=KINDS[kind])]
        reduce_ones(comm, kind)
        lost.append(failure_of(comm.all_reduce, x, algorithm=KINDS[kind]))
        with torch.no_grad():
            assert torch.equal(comm.all_reduce(x, algorithm=KINDS[kind]), torch.full((4,), 2.0))
        return lost


@pytest.mark.parametrize("kind", ["cpu", "torch"])
def test_f10_in_larger_worlds_a_gradient_that_would_be_lost_is_refused(world, kind):
    for lost in world(2, _would_lose_the_gradient, kind):
        for failure in lost:
            assert failure.kind == "ConfigError"
            assert "would lose the gradient" in failure.text
