"""Each verb over torch.distributed itself, on tables of parts: what gloo is asked, and what comes back."""

import pytest
import torch
import torch.distributed as dist

from tcomm import reference
from tcomm.errors import PeerTimeoutError
from tcomm.groups.fallback import TorchFallback
from tcomm.groups.jobs import JOBS, Caller
from tcomm.groups.torch_verbs import make_torch_plan
from tests.groups.verbs import MOVED, inputs_to_move, unequal_bits


def _call(member, fallback, verb, inputs, *args, timeout=20.0):
    """Run `verb` as a plan would; None where this rank gets no result."""
    x = inputs[member.rank]
    job = JOBS[verb](Caller(member.rank, member.world_size, x.shape, x.dtype), *args)
    out = torch.zeros(job.shape, dtype=x.dtype) if job.shape is not None else torch.full((3,), 7.0)
    make_torch_plan(fallback, job.call, job.parts)(x, out, timeout)
    if job.shape is None:
        assert out.eq(7).all()
        return None
    return out


def _fallback(member):
    member.process_group()
    return TorchFallback("tp", dist.group.WORLD, None)


def _moves(member):
    fallback, world, rank = _fallback(member), member.world_size, member.rank
    for seed, dtype in enumerate(MOVED):
        root, sizes = seed % world, [(2 * r + seed) % 4 for r in range(world)]
        inputs = inputs_to_move(seed, [(2 * world, 3)] * world, dtype)
        ragged = inputs_to_move(seed, [(n, 3) for n in sizes], dtype)
        counts = [[(s + d + seed) % 3 for d in range(world)] for s in range(world)]
        rows = inputs_to_move(seed, [(sum(line), 3) for line in counts], dtype)
        for verb, given, args, want in (
            ("broadcast", inputs, (root,), reference.broadcast(inputs, root)),
            ("all_gather_single", inputs, (0,), reference.all_gather(inputs)),
            ("all_gatherv", ragged, (sizes, 0), reference.all_gather(ragged)),
            ("gather", inputs, (root, 0), reference.gather(inputs, root)),
            ("scatter", inputs, (root, 0), reference.scatter(inputs, root)),
            ("all_to_all_single", inputs, (), reference.all_to_all(inputs)),
            ("all_to_all_ragged", rows, (tuple(map(tuple, counts)),), reference.all_to_all(rows, counts)),
        ):
            got = _call(member, fallback, verb, given, *args)
            assert unequal_bits(got, want[rank]) == "", (verb, dtype)


@pytest.mark.parametrize("world_size", [2, 3])
def test_data_of_any_dtype_goes_through_gloo_as_bytes(on_ranks, world_size):
    on_ranks(world_size, _moves)


def _reduces(member):
    fallback, world, rank = _fallback(member), member.world_size, member.rank
    sizes = [0, 2 * world, *[0] * (world - 2)]
    for dtype, op in ((torch.float32, "avg"), (torch.uint8, "sum"), (torch.int64, "product")):
        inputs = [torch.arange(1, 6 * world + 1).view(-1, 3).to(dtype) + r for r in range(world)]
        stacked = torch.stack(inputs)
        whole = {"avg": lambda s: s.sum(0) / world, "sum": lambda s: s.sum(0), "product": lambda s: s.prod(0)}
        want = whole[op](stacked).to(dtype)
        before = inputs[rank].clone()
        for verb, args, result in (
            ("all_reduce", (op,), want),
            ("reduce", (1, op), want if rank == 1 else None),
            ("reduce_scatter_single", (op, 0), want.chunk(world)[rank]),
            ("reduce_scatterv", (sizes, op, 0), want.split(sizes)[rank]),
        ):
            got = _call(member, fallback, verb, inputs, *args)
            assert (got is None and result is None) or got.allclose(result), (verb, dtype, got, result)
            assert inputs[rank].equal(before), verb


@pytest.mark.parametrize("world_size", [2, 3])
def test_reductions_are_torchs_and_leave_their_input(on_ranks, world_size):
    on_ranks(world_size, _reduces)


def _reduces_bools(member):
    fallback, rank = _fallback(member), member.rank
    inputs = [torch.tensor([[True, False], [True, False]]), torch.tensor([[True, True], [False, False]])]
    want = torch.tensor([[1, 1], [1, 0]], dtype=torch.uint8)
    for verb, args, result in (
        ("all_reduce", ("sum",), want),
        ("reduce", (0, "sum"), None if rank else want),
        ("reduce_scatter_single", ("sum", 0), want[rank : rank + 1]),
    ):
        got = _call(member, fallback, verb, inputs, *args)
        assert (got is None and result is None) or got.view(torch.uint8).equal(result), (verb, got)


def test_a_sum_of_bools_is_made_of_bools(on_ranks):
    on_ranks(2, _reduces_bools)


def _silent(member):
    fallback, told = _fallback(member), []
    if member.rank == 0:
        with pytest.raises(PeerTimeoutError) as caught:
            _call(member, fallback, "all_gather_single", [torch.ones(2)] * 2, 0, timeout=0.4)
        told = [str(caught.value), caught.value.op]
    member.meet("done")
    return told


def test_a_silent_peer_ends_any_verb_at_its_deadline(on_ranks):
    told = on_ranks(2, _silent)[0]
    assert told == [
        "all_gather_single of group 'tp' failed in torch.distributed: no answer for 0.4 s",
        "all_gather_single",
    ]
