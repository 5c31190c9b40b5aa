"""Blocks of calls: the bits of single calls, one message for each kind, nothing sent where one raises."""

import functools

import pytest
import torch

from tcomm.errors import CollectiveMismatchError, ConfigError
from tcomm.memory.control import Word
from tests.groups.verbs import (
    MOVED,
    group_for,
    inputs_to_reduce,
    join,
    random_bytes,
    unequal_bits,
    wrong_result,
)

VERBS = ("all_reduce", "broadcast", "all_gather_single", "reduce_scatter_single", "all_to_all_single")


def _block(comm, *calls):
    with comm.coalescing() as batch:
        for call in calls:
            call(batch)


def _call(verb, *args_and_batch):
    *args, batch = args_and_batch
    getattr(batch, verb)(*args)


def _tensors(verb, rank, world):
    """Tensors of several shapes and layouts, and where nothing is reduced, of several dtypes."""
    shapes = [(world,), (2 * world, 3), (0, 2), (world, 1, 5)]
    shapes += [()] if verb in ("all_reduce", "broadcast") else []
    for i, shape in enumerate(shapes):
        if verb in ("all_reduce", "reduce_scatter_single"):
            yield inputs_to_reduce(i, world, shape, torch.bfloat16)[rank]
        else:
            yield random_bytes(10 * i + rank, shape, MOVED[(3 * i) % len(MOVED)])
    flipped = torch.arange(float(2 * world)).bfloat16().view(2, world).t() * (rank + 1)
    yield flipped
    yield torch._neg_view(flipped.clone())


def _args(verb):
    return {"all_reduce": ("max",), "reduce_scatter_single": ("sum",), "broadcast": (1,)}.get(verb, ())


def _like_single_calls(member, algorithm):
    comm, found = group_for(member, algorithm), []
    for verb in VERBS:
        args, op = _args(verb), {"all_reduce": "max", "reduce_scatter_single": "sum"}.get(verb, "")
        xs = list(_tensors(verb, member.rank, member.world_size))
        singles = [getattr(comm, verb)(x, *args) for x in xs]
        outs = [
            torch.zeros(*y.shape, 2, dtype=y.dtype)[..., 1] if i % 2 else None for i, y in enumerate(singles)
        ]
        with comm.coalescing() as batch:
            results = [getattr(batch, verb)(x, *args, out=out) for x, out in zip(xs, outs, strict=True)]
        assert all(out is None or out is got for out, got in zip(outs, results, strict=True))
        found += [f"{verb} {w}" for w in map(wrong_result, results, singles, [op] * len(xs)) if w]
        untouched = _tensors(verb, member.rank, member.world_size)
        found += join(unequal_bits(x, y) for x, y in zip(xs, untouched, strict=True))
    comm.close()
    return found


@pytest.mark.parametrize(("world_size", "algorithm"), [(1, ""), (2, ""), (3, ""), (4, ""), (2, "torch")])
def test_a_block_has_the_bits_of_single_calls(on_ranks, world_size, algorithm):
    if world_size == 1:
        # A world of one has no rank 1 to broadcast.
        assert on_ranks(1, _alone) == [[]]
    else:
        assert on_ranks(world_size, _like_single_calls, algorithm) == [[]] * world_size


def _alone(member):
    comm = member.communicator()
    x, y = random_bytes(1, (2, 3), torch.uint8), random_bytes(2, (4,), torch.complex128)
    with comm.coalescing() as batch:
        results = [batch.broadcast(x, 0), batch.broadcast(y, 0), batch.all_gather_single(y)]
    return join([unequal_bits(got, want) for got, want in zip(results, (x, y, y), strict=True)])


def _epochs(member):
    comm = member.communicator()
    words, counts = comm._arena.channel.words, []
    x, y, z = torch.ones(4), torch.ones(2, 3), torch.ones(4, dtype=torch.int64)
    comm.barrier()
    comm.all_reduce(x)

    def count(*calls):
        for _ in range(2):
            before = words[Word.EPOCH]
            _block(comm, *(functools.partial(_call, *call) for call in calls))
            took = words[Word.EPOCH] - before
        counts.append(took)

    count(("all_reduce", x), ("all_reduce", y), ("all_reduce", torch.tensor(1.0)))
    count(("all_reduce", x), ("all_reduce", z))
    count(("all_reduce", x), ("all_reduce", y, "max"))
    count(("all_reduce", x), ("broadcast", y, 0), ("broadcast", z, 0), ("broadcast", z, 1), ("all_reduce", x))
    count(("all_gather_single", x), ("all_gather_single", z), ("all_to_all_single", z))
    count()
    comm.close()
    return counts


def test_neighbours_of_one_kind_are_one_epoch(on_ranks):
    assert on_ranks(2, _epochs) == [[1, 2, 2, 4, 2, 0]] * 2


def _in_place(member):
    comm = member.communicator()
    xs = [torch.full((3 + i,), float(member.rank + i)) for i in range(4)]
    with comm.coalescing() as batch:
        assert all(batch.all_reduce(x, out=x) is x for x in xs)
    assert [x.tolist() for x in xs] == [[1.0 + 2 * i] * (3 + i) for i in range(4)]
    comm.close()


def test_tensors_may_be_reduced_in_place(on_ranks):
    on_ranks(2, _in_place)


def _raises(member):
    """Whatever raises in a block, nothing of it is sent, and the next one is as if it had not been."""
    comm, told = member.communicator(), []
    comm.all_reduce(torch.ones(2))
    words = comm._arena.channel.words
    x = torch.ones(4)
    wrong = [
        lambda batch: batch.all_reduce(x, "mean"),
        lambda batch: batch.all_reduce([1.0]),
        lambda batch: batch.all_reduce(x.clone().requires_grad_()),
        lambda batch: batch.all_reduce(x, out=torch.ones(5)),
        lambda batch: batch.broadcast(x, 2),
        lambda batch: batch.all_gather_single(torch.tensor(1.0)),
        lambda batch: batch.reduce_scatter_single(torch.ones(3)),
        lambda batch: batch.all_reduce(batch.all_reduce(x)),
        lambda batch: 1 / 0,
    ]
    before = words[Word.EPOCH]
    for call in wrong if member.rank == 0 else ():
        with pytest.raises((ConfigError, ZeroDivisionError)) as caught:
            _block(comm, lambda batch: batch.all_reduce(x), call)
        told.append(str(caught.value))
    assert words[Word.EPOCH] == before
    with comm.coalescing() as batch:
        total = batch.all_reduce(x)
    assert total.tolist() == [2.0] * 4
    comm.close()
    return told


def test_a_block_that_raises_sends_nothing(on_ranks):
    told = on_ranks(2, _raises)[0]
    assert told[0].startswith("reduce operation 'mean' is unknown")
    assert told[1:4] == [
        "all_reduce takes a torch.Tensor, not list",
        "all_reduce would lose the gradient of its input; call it under torch.no_grad() or on x.detach()",
        "out= of all_reduce is float32 [5] on cpu; needed float32 [4] on cpu",
    ]
    assert told[4] == "root=2 of broadcast is not a rank of this group; ranks are 0 to 1"
    assert told[7] == "all_reduce takes a result of this block, which is not there before the block ends"
    assert told[8] == "division by zero"


def _differ(member):
    """Blocks that fill as many bytes with other tensors, or hold more or fewer of them."""
    comm, told = member.communicator(), []
    shapes = [[(2,), (6,)], [(6,), (2,)]]
    cases = [
        [("all_reduce", torch.ones(shape)) for shape in shapes[member.rank]],
        [("all_gather_single", torch.ones(shape)) for shape in shapes[member.rank]],
        [("broadcast", torch.ones(4).to([torch.float32, torch.int32][member.rank]), 0) for _ in range(2)],
        [("broadcast", torch.ones(4), 0), ("broadcast", torch.ones(4), member.rank)],
        [("all_reduce", torch.ones(4))] * (1 + member.rank),
    ]
    # A plan of as many bytes is there already, and is not theirs.
    _block(comm, *(functools.partial(_call, "all_reduce", torch.ones(shape)) for shape in shapes[0]))
    for calls in cases:
        with pytest.raises(CollectiveMismatchError) as caught:
            _block(comm, *(functools.partial(_call, *call) for call in calls))
        told.append(str(caught.value).splitlines()[1:3])
        comm.barrier()
    comm.close()
    return told


def test_blocks_that_differ_are_told_apart(on_ranks):
    told = on_ranks(2, _differ)
    assert told[0] == told[1]
    assert told[0][0] == [
        "  rank 0: all_reduce float32 [8] sum of float32 [2]; float32 [6] via cpu:one_shot_pull",
        "  rank 1: all_reduce float32 [8] sum of float32 [6]; float32 [2] via cpu:one_shot_pull",
    ]
    assert "of int32 [4]; int32 [4]" in told[0][2][1]


def _behind(member):
    """A block takes its turn behind what is under way."""
    comm = member.communicator()
    works = [comm.all_reduce(torch.full((4,), float(turn)), async_op=True) for turn in range(5)]
    with comm.coalescing() as batch:
        a, b = batch.all_reduce(torch.ones(3)), batch.all_reduce(torch.ones(2))
    assert all(work.is_completed() for work in works)
    comm.close()
    return a.tolist() + b.tolist()


def test_a_block_takes_its_turn(on_ranks):
    assert on_ranks(2, _behind) == [[2.0] * 5] * 2
