import time

import numpy
import pytest
import torch
import triton
import triton.language as tl

from tcomm.kernels import all_reduce
from tcomm.kernels.device import accumulate, rounded
from tcomm.memory.channel import Channel
from tcomm.memory.control import EPOCH_MASK, MAX_BLOCKS, MAX_WORLD_SIZE, Word, arrival_index, dead_word
from tests.kernels.test_all_reduce import use_tiles
from tests.test_algorithms import CPU, TRITON, description, mistake, reduce_by

LAST_CALLS_OF_A_WRAP = 2**32 - 3


def at_epoch(member, arena, epoch):
    """Go on from `epoch` on all ranks. **Collective.**"""
    member.meet(f"{epoch}/quiet")
    arena.set_epoch(epoch)
    member.meet(f"{epoch}/set")


def _across(member, names, epoch, num_calls):
    use_tiles(8192)
    arena, found = member.arena(staging_bytes=64 * 1024), []
    for turn, name in enumerate(names):
        at_epoch(member, arena, epoch + (turn << 32))
        found += [mistake(member, arena, seed, name, shape=(600 + seed,)) for seed in range(num_calls)]
        assert arena.channel.words[Word.EPOCH] >= epoch + num_calls & EPOCH_MASK
    assert not any(found), "\n".join(filter(None, found))


@pytest.mark.parametrize("names", [TRITON, CPU])
def test_results_are_right_across_the_wrap_of_the_epoch(on_ranks, names):
    on_ranks(2, _across, names, LAST_CALLS_OF_A_WRAP, 8)


@pytest.mark.parametrize("quarter", [1, 3])
def test_results_are_right_where_words_are_renewed(on_ranks, quarter):
    on_ranks(2, _across, (*TRITON, *CPU), quarter * 2**30 - 2, 4)


def _counts_on_past_zero(member):
    arena = member.arena()
    at_epoch(member, arena, LAST_CALLS_OF_A_WRAP)
    seen = []
    for name in (*CPU, *TRITON):
        reduce_by(name, torch.ones(3), arena)
        seen.append(arena.channel.words[Word.EPOCH])
    return seen


def test_the_epoch_goes_from_its_last_value_to_zero(on_ranks):
    last = 2**32 - 1
    assert on_ranks(2, _counts_on_past_zero) == [[last - 1, last, 0, 1, 2, 3, 4]] * 2


def _plant_leftovers(arena, name, x, epochs):
    """Words and lanes as a peer would have left them exactly one wrap ago; nothing else has arrived."""
    signature = description(name, x, "sum").signature
    for epoch in epochs:
        for peer in arena.channel.peers:
            index = arrival_index(1, epoch & 1, 0, peer)
            arena.channel.words[index] = epoch << 32 | signature
        lanes = arena.channel.lanes[epoch & 1]
        for index in range(len(lanes)):
            lanes[index] = epoch << 32 | 0x41414141


def late(function):
    """`function`, after a while."""

    def run(*args, **kwargs):
        time.sleep(0.2)
        return function(*args, **kwargs)

    return run


def _leftovers(member, name, renewed_by):
    """Epochs 2**30 and 2**30 + 1 renew; at the next ones a leftover would let rank 0 run ahead of rank 1."""
    arena = member.arena(staging_bytes=64 * 1024)
    first = 2**30
    at_epoch(member, arena, first - 2)
    x = torch.arange(64.0) + 100 * member.rank
    _plant_leftovers(arena, name, x, (first + 1, first + 2))
    if renewed_by != "host":
        Channel._renew = lambda *_: None
    member.meet("planted")
    step = "triton:one_shot_pull" if renewed_by == "kernel" else "cpu:one_shot_pull"
    for _ in range(2):
        reduce_by(step, x, arena)
    if member.rank == 1:
        Channel.await_peers = late(Channel.await_peers)
        all_reduce.reduce_span = late(all_reduce.reduce_span)
        all_reduce.push_lanes = late(all_reduce.push_lanes)
    member.meet("late")
    results = [reduce_by(name, x, arena), reduce_by(name, x, arena)]
    assert arena.channel.words[Word.EPOCH] == first + 2
    expected = 2 * torch.arange(64.0) + 100
    return [torch.equal(result, expected) for result in results]


@pytest.mark.parametrize(
    ("name", "renewed_by"),
    [
        ("cpu:two_shot", "host"),
        ("triton:two_shot", "host"),
        ("triton:two_shot", "kernel"),
        ("triton:one_shot_ll", "host"),
        ("triton:one_shot_ll", "kernel"),
    ],
)
def test_a_word_from_one_wrap_ago_is_no_arrival(on_ranks, name, renewed_by):
    assert on_ranks(2, _leftovers, name, renewed_by) == [[True, True]] * 2


@pytest.mark.parametrize("name", ["cpu:two_shot", "triton:two_shot", "triton:one_shot_ll"])
def test_without_renewal_a_word_from_one_wrap_ago_would_be_an_arrival(on_ranks, name):
    first, _ = on_ranks(2, _leftovers, name, "nobody")[0]
    assert first is False


def _renewed_words(member, name):
    arena = member.arena(staging_bytes=64 * 1024)
    words, lanes, seen = arena.channel.words, arena.channel.lanes, []
    at_epoch(member, arena, 2**31 - 1)
    for parity in (0, 1):
        for phase in (0, 1):
            words[arrival_index(phase, parity, MAX_BLOCKS - 1, MAX_WORLD_SIZE - 1)] = 77
        lanes[parity][0] = lanes[parity][-1] = 77
    for _ in range(2):
        reduce_by(name, torch.ones(3), arena)
        epoch = words[Word.EPOCH]
        other = epoch + 1 & 1
        last = [words[arrival_index(phase, other, MAX_BLOCKS - 1, MAX_WORLD_SIZE - 1)] for phase in (0, 1)]
        seen.append({*last, lanes[other][0], lanes[other][-1]} == {dead_word(epoch)})
    return seen


@pytest.mark.parametrize("name", ["cpu:one_shot_push", "triton:one_shot_push"])
def test_two_calls_renew_every_word_and_lane_of_both_parities(on_ranks, name):
    assert on_ranks(2, _renewed_words, name) == [[True, True]] * 2


@triton.jit
def _round(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, rounded(tl.load(x_ptr + offs), out_ptr.dtype.element_ty))


@triton.jit
def _accumulate(a_ptr, b_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, accumulate(tl.load(a_ptr + offs), tl.load(b_ptr + offs), OP))


@pytest.mark.parametrize("low", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_bfloat16_is_rounded_to_nearest_even_as_torch_does(low):
    high = torch.arange(1 << 16, dtype=torch.int64)
    bits = (high << 16 | low).to(torch.uint32).view(torch.int32)
    x = bits.view(torch.float32)
    out = torch.empty(1 << 16, dtype=torch.bfloat16)
    _round[(1,)](x, out, 1 << 16)
    expected = x.to(torch.bfloat16)
    assert torch.equal(out.isnan(), x.isnan())
    numbers = ~x.isnan()
    assert torch.equal(out.view(torch.int16)[numbers], expected.view(torch.int16)[numbers])


@pytest.mark.parametrize(("op", "pick"), [("max", torch.maximum), ("min", torch.minimum), ("sum", torch.add)])
def test_nan_wins_from_either_side(op, pick):
    values = [1.0, -2.0, float("nan"), float("inf"), float("-inf"), 0.5, 3.0, -0.25]
    a = torch.tensor(values).repeat_interleave(8)
    b = torch.tensor(values).repeat(8)
    out = torch.empty(64)
    with numpy.errstate(invalid="ignore"):
        _accumulate[(1,)](a, b, out, op, 64)
    assert torch.equal(out.isnan(), pick(a, b).isnan())
    assert torch.equal(out.nan_to_num(), pick(a, b).nan_to_num())
