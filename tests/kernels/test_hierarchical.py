import random
import time
from types import SimpleNamespace

import pytest
import torch

from tcomm import reference
from tcomm.algorithms import acc_dtype, combine_of
from tcomm.errors import (
    CapabilityError,
    CollectiveMismatchError,
    ConfigError,
    PeerLostError,
    PeerTimeoutError,
)
from tcomm.kernels import heap, nodes, rails
from tcomm.kernels.hierarchical import hierarchical_all_gather, hierarchical_all_reduce
from tcomm.memory.arena import open_arena
from tcomm.memory.channel import Channel
from tcomm.memory.control import Word
from tcomm.memory.wait import SET_SHIFT, Wait
from tests.kernels.test_all_reduce import poison, use_tiles
from tests.test_reference import difference, every_ranks_input

WORLDS = [(4, 2), (3, 3)]
"""Ranks, and nodes that they are on."""
HALVES = [torch.float32, torch.bfloat16, torch.float16]


def reduced(inputs, num_nodes, op):
    """The reduction in rank order inside nodes, then in node order, rounded once."""
    combine, local = combine_of(op), len(inputs) // num_nodes
    wide = [x.to(acc_dtype(x.dtype)) for x in inputs]
    sums = []
    for node in range(num_nodes):
        total = wide[node * local]
        for x in wide[node * local + 1 : (node + 1) * local]:
            total = combine(total, x)
        sums.append(total)
    total = sums[0]
    for other in sums[1:]:
        total = combine(total, other)
    if op == "avg":
        total = total * torch.tensor(1.0 / len(inputs), dtype=total.dtype)
    return total.to(inputs[0].dtype)


def reduce_mistake(member, arena, num_nodes, seed, op="sum", dtype=torch.float32, shape=(7,), in_place=False):
    inputs = every_ranks_input(seed, member.world_size, shape, dtype, special=False)
    x = inputs[member.rank].clone()
    got = hierarchical_all_reduce(x, arena, num_nodes, op, out=x if in_place else None, timeout=20.0)
    wrong = difference(got, reduced(inputs, num_nodes, op), op)
    if not (in_place or wrong) and difference(x, inputs[member.rank]):
        wrong = "the input was changed"
    return f"all_reduce {op} {dtype} {list(shape)} seed {seed}: {wrong}" if wrong else ""


def gather_mistake(member, arena, num_nodes, seed, dtype=torch.float32, shape=(7,)):
    inputs = every_ranks_input(seed, member.world_size, shape, dtype, special=False)
    got = hierarchical_all_gather(inputs[member.rank], arena, num_nodes, timeout=20.0)
    wrong = difference(got, torch.stack(inputs))
    return f"all_gather {dtype} {list(shape)} seed {seed}: {wrong}" if wrong else ""


def refuse(found):
    assert not any(found), "\n".join(filter(None, found))


def _numbers_of_the_docstrings(member):
    arena = member.arena()
    x = torch.tensor([10.0**member.rank, 2 * 10.0**member.rank])
    total = hierarchical_all_reduce(x, arena, 2)
    return total.tolist(), hierarchical_all_gather(torch.tensor([member.rank]), arena, 2).tolist()


def test_the_examples_of_the_docstrings(on_ranks):
    wanted = ([1111.0, 2222.0], [[0], [1], [2], [3]])
    assert on_ranks(4, _numbers_of_the_docstrings) == [wanted] * 4


def _bits(member, num_nodes):
    use_tiles(128)
    arena = member.arena()
    poison(member, arena, "bits")
    cases = [(op, dtype) for dtype in HALVES for op in ("sum", "avg", "max")]
    cases += [("sum", torch.float64), ("min", torch.int32), ("sum", torch.int64)]
    gathered = [torch.float32, torch.bfloat16, torch.uint8, torch.int16, torch.float64]
    # A kernel is the same for every number of nodes: some of the cases are enough for the second.
    every = 1 if num_nodes == 2 else 3
    found = [
        reduce_mistake(member, arena, num_nodes, seed, op, dtype, (515,), in_place=seed % 2 == 0)
        for seed, (op, dtype) in enumerate(cases[::every])
    ]
    found += [
        gather_mistake(member, arena, num_nodes, seed, dtype, (3, 77))
        for seed, dtype in enumerate(gathered[::every])
    ]
    refuse(found)


@pytest.mark.parametrize(("world_size", "num_nodes"), WORLDS)
def test_every_operation_and_dtype_has_the_documented_bits(on_ranks, world_size, num_nodes):
    on_ranks(world_size, _bits, num_nodes)


def test_two_nodes_of_four(on_ranks):
    on_ranks(8, _odd_sizes, 2, [(0,), (1,), (301,)])


def _odd_sizes(member, num_nodes, shapes):
    use_tiles(64)
    arena = member.arena()
    poison(member, arena, "odd")
    found = [reduce_mistake(member, arena, num_nodes, seed, shape=shape) for seed, shape in enumerate(shapes)]
    found += [
        gather_mistake(member, arena, num_nodes, seed, shape=shape) for seed, shape in enumerate(shapes)
    ]
    refuse(found)


@pytest.mark.parametrize(("world_size", "num_nodes"), WORLDS)
def test_odd_and_empty_and_0d_sizes(on_ranks, world_size, num_nodes):
    on_ranks(
        world_size, _odd_sizes, num_nodes, [(0,), (1,), (2,), (7,), (127,), (128,), (400,), (3, 0, 5), ()]
    )


def _larger_than_the_staging(member, num_nodes):
    use_tiles(4096)
    arena = member.arena(staging_bytes=64 * 1024)
    capacity, _ = nodes.reduce_regions(
        arena.staging.layout.half_bytes, num_nodes, member.world_size // num_nodes, 1
    )
    found = [
        reduce_mistake(member, arena, num_nodes, 1, shape=(2 * capacity // 4 + 5,)),
        reduce_mistake(member, arena, num_nodes, 2, dtype=torch.bfloat16, shape=(capacity,)),
        gather_mistake(member, arena, num_nodes, 3, shape=(2 * capacity // 4 + 5,)),
    ]
    refuse(found)


@pytest.mark.parametrize(("world_size", "num_nodes"), WORLDS)
def test_messages_larger_than_the_staging(on_ranks, world_size, num_nodes):
    on_ranks(world_size, _larger_than_the_staging, num_nodes)


def _mixed(member, num_nodes, num_calls):
    use_tiles(64)
    sleepy, same = random.Random(member.rank), random.Random(7)

    def late(function):
        def run(*args, **kwargs):
            if sleepy.random() < 0.3:
                time.sleep(sleepy.random() * 0.01)
            return function(*args, **kwargs)

        return run

    with pytest.MonkeyPatch.context() as patch:
        arena = member.arena(staging_bytes=128 * 1024)
        patch.setattr(Channel, "begin", late(Channel.begin))
        patch.setattr(rails, "quiet", late(rails.quiet))
        patch.setattr(heap, "_store_word", late(heap._store_word))
        found = []
        for seed in range(num_calls):
            shape, dtype = (same.choice([0, 1, 7, 300, 900]),), same.choice(HALVES)
            if same.random() < 0.5:
                found.append(gather_mistake(member, arena, num_nodes, seed, dtype, shape))
            else:
                found.append(reduce_mistake(member, arena, num_nodes, seed, "sum", dtype, shape))
    refuse(found)


@pytest.mark.parametrize(("world_size", "num_nodes"), WORLDS)
def test_many_calls_reuse_the_staging_while_ranks_are_late(on_ranks, world_size, num_nodes):
    on_ranks(world_size, _mixed, num_nodes, 16 if num_nodes == 2 else 8)


def _wrap(member):
    use_tiles(64)
    arena, found = member.arena(), []
    for start in (2**31 - 2, 2**32 - 2):
        member.meet(f"before {start}")
        arena.set_epoch(start)
        member.meet(f"after {start}")
        for seed in range(4):
            found.append(reduce_mistake(member, arena, 2, seed, shape=(100,)))
            found.append(gather_mistake(member, arena, 2, seed))
    refuse(found)


def test_epochs_wrap(on_ranks):
    on_ranks(4, _wrap)


def _guard(member):
    use_tiles(64)
    arena, found = member.arena(), []
    for numel in (1, 77, 301):
        x = torch.full((numel,), member.rank + 1.0)
        guarded = torch.full((4 * numel + 202,), 77.0)
        hierarchical_all_reduce(x, arena, 2, out=guarded[101 : 101 + numel])
        if not guarded[:101].eq(77).all() or not guarded[101 + numel :].eq(77).all():
            found.append(f"all_reduce {numel}: guard band written")
        guarded.fill_(77)
        hierarchical_all_gather(x, arena, 2, out=guarded[101 : 101 + 4 * numel].view(4, numel))
        if not guarded[:101].eq(77).all() or not guarded[101 + 4 * numel :].eq(77).all():
            found.append(f"all_gather {numel}: guard band written")
    refuse(found)


def test_nothing_is_written_around_the_output(on_ranks):
    on_ranks(4, _guard)


def _touched(member):
    use_tiles(32)
    arena, numel, found = member.arena(), 77, []
    layout = arena.staging.layout
    for collective, used in ((hierarchical_all_reduce, 3 * numel), (hierarchical_all_gather, 2 * numel)):
        own = 0x5A + member.rank
        poison(member, arena, collective.__name__, own)
        collective(torch.ones(numel), arena, 2)
        member.meet(f"{collective.__name__}/done")
        half = layout.half(arena.channel.words[Word.EPOCH] & 1)
        staged = arena.staging.buffer.local[half : half + layout.half_bytes]
        found.append((int((staged != own).sum()), 4 * used))
    return found


def test_nothing_is_staged_but_the_message_and_a_slice_of_each_node(on_ranks):
    for found in on_ranks(2, _touched):
        assert all(0.9 * allowed < touched <= allowed for touched, allowed in found), found


@pytest.mark.parametrize("in_call", [4, 5])
def test_whoever_is_late_because_of_another_is_not_to_blame(in_call):
    """Rank 0 waits for 1, which waits for 2, which waits for 3 in another call or not at all."""
    pages = [SimpleNamespace(words={Word.WAITING_FOR: w, Word.SEQ: 4}) for w in (2, 3, 4, 0)]
    pages[2].words[Word.SEQ] = in_call
    channel = SimpleNamespace(rank=0, peers=(1, 2, 3), pages=pages, deadline=lambda: None)
    assert Wait(channel, 0b10 << SET_SHIFT, 0, 4 << 32)._culprits([1]) == ([3] if in_call == 4 else [2])
    assert Wait(channel, 0, 0, 4 << 32)._culprits([1]) == [1]


def _traffic(member):
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        made = []
        patch.setattr(nodes, "Heap", lambda *args: made.append(heap.Heap(*args)) or made[-1])
        arena = member.arena()
        for collective in (hierarchical_all_reduce, hierarchical_all_gather):
            collective(torch.ones(1000), arena, 2)
            seen[collective.__name__] = dict(made[-1].traffic)
    tables = [nodes.near_table(buffer, 2).tolist() for buffer in (arena.control, arena.staging.buffer)]
    return seen, [[address != 0 for address in table] for table in tables]


def test_nothing_but_a_put_a_block_passes_between_nodes_and_only_along_rails(on_ranks):
    for rank, (seen, reached) in enumerate(on_ranks(4, _traffic)):
        far = (rank + 2) % 4
        assert all(traffic == {("put_signal", far): 1} for traffic in seen.values()), seen
        assert reached == [[r // 2 == rank // 2 for r in range(4)]] * 2


def _other_pes(member):
    arena = member.arena()
    x = torch.full((3,), 2.0**member.rank)
    numbers = [7, 3, 5, 11]
    return hierarchical_all_reduce(x, arena, 2, pes=numbers).tolist()


def test_a_rank_may_have_any_number_in_nvshmem(on_ranks):
    assert on_ranks(4, _other_pes) == [[15.0] * 3] * 4


def _different_calls(member, odd_one):
    use_tiles(32)
    arena, told = member.arena(), []
    time.sleep(0.3 * (member.rank // 2))
    for collective in [hierarchical_all_reduce] * 3 + [hierarchical_all_gather, hierarchical_all_reduce]:
        with pytest.raises(CollectiveMismatchError) as caught:
            collective(torch.ones(500 if member.rank == odd_one else 7), arena, 2, timeout=20.0)
        told.append((caught.value.peers, str(caught.value)))
    refuse([reduce_mistake(member, arena, 2, 5), gather_mistake(member, arena, 2, 6)])
    return told


@pytest.mark.parametrize("odd_one", [0, 3])
def test_every_rank_hears_of_a_rank_that_calls_something_else(on_ranks, odd_one):
    for rank, told in enumerate(on_ranks(4, _different_calls, odd_one)):
        for peers, message in told:
            assert peers == (odd_one,) if rank != odd_one else tuple(r for r in range(4) if r != rank)
            assert f"rank {odd_one}: all_" in message
            assert "[500]" in message
            assert "not arrived yet" not in message


def _one_stays_away(member, absent, collective):
    arena = member.arena()
    if member.rank == absent:
        member.meet("all others have raised")
        return None
    began = time.monotonic()
    with pytest.raises((PeerTimeoutError, PeerLostError)) as caught:
        collective(torch.ones(7), arena, 2, timeout=0.5)
    seconds = time.monotonic() - began
    member.meet("all others have raised")
    return type(caught.value).__name__, caught.value.peers, seconds


@pytest.mark.parametrize(
    ("world_size", "collective"),
    [(2, hierarchical_all_reduce), (4, hierarchical_all_reduce), (4, hierarchical_all_gather)],
)
def test_a_rank_that_never_comes_is_named_by_all_others_within_the_deadline(on_ranks, world_size, collective):
    absent = world_size - 1
    for outcome in on_ranks(world_size, _one_stays_away, absent, collective)[:-1]:
        kind, peers, seconds = outcome
        assert (kind, peers) == ("PeerTimeoutError", (absent,))
        assert seconds < 5


def _bad_arguments(member):
    arena = member.arena()
    bad = [
        (hierarchical_all_reduce, (torch.ones(3), arena, 1), {}, "2 ranks on 1 nodes; give 2 nodes or more"),
        (hierarchical_all_gather, (torch.ones(3), arena, 3), {}, "2 ranks on 3 nodes; give 2 nodes or more"),
        (hierarchical_all_reduce, (torch.ones(3), arena, 2, "mean"), {}, "op 'mean' is not among"),
        (
            hierarchical_all_reduce,
            (torch.ones(3), arena, 2),
            {"out": torch.ones(4)},
            "out is torch.float32 \\[4\\]",
        ),
        (
            hierarchical_all_gather,
            (torch.ones(3), arena, 2),
            {"out": torch.ones(6)},
            "must be torch.float32 \\[2, 3",
        ),
        (hierarchical_all_gather, (torch.ones(2, 3).t(), arena, 2), {}, "needs contiguous x and out"),
        (hierarchical_all_gather, (torch.ones(3), arena, 2), {"pes": [0]}, "1 PEs for 2 ranks"),
    ]
    for collective, args, kwargs, message in bad:
        with pytest.raises(ConfigError, match=message):
            collective(*args, **kwargs)
    refuse([reduce_mistake(member, arena, 2, 1)])
    bare = open_arena("bare", member.exchange("bare"), "/dev/shm", 1, 20.0)
    with pytest.raises(CapabilityError, match="no staging memory yet"):
        hierarchical_all_reduce(torch.zeros(3), bare, 2)
    bare.close("done")


def test_bad_arguments_are_refused_before_anything_is_sent(on_ranks):
    on_ranks(2, _bad_arguments)


def test_an_all_gather_means_what_the_reference_says():
    inputs = [torch.ones(2, 3) * rank for rank in range(4)]
    assert torch.equal(torch.cat(inputs), reference.all_gather(inputs)[0])


@pytest.mark.parametrize("num_nodes", [2, 3, 8])
@pytest.mark.parametrize("local", [1, 2, 8])
@pytest.mark.parametrize("widening", [1, 2])
def test_slots_of_a_half_hold_the_slices_of_the_longest_message(num_nodes, local, widening):
    for half_bytes in (28672, 65536, 3 << 20):
        capacity, slot = nodes.reduce_regions(half_bytes, num_nodes, local, widening)
        assert capacity % 128 == slot % 128 == 0
        assert capacity + num_nodes * slot <= half_bytes
        longest_slice = -(-capacity // (local * 128)) * 128
        assert slot >= longest_slice * widening or capacity == 0
