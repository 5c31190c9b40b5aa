import pytest
import torch
import triton
import triton.language as tl

from tcomm.errors import PeerTimeoutError
from tcomm.kernels.device import begin_call, finish_call, launched_rank, page_of, pointer_to
from tcomm.kernels.launch import launch_part
from tcomm.kernels.phases import (
    active_ranks,
    await_active,
    await_ranks,
    is_active,
    open_word,
    publish_last,
    publish_last_to,
)
from tcomm.memory.control import Word
from tcomm.memory.virtual import VirtualArena
from tcomm.signature import CallDescription
from tests.kernels.test_device import LAST_CALLS_OF_A_WRAP, at_epoch

CALL = CallDescription("turn", "int64")
GIVING, TAKING = 3, 2


@triton.jit
def _give_kernel(
    x_ptr, out_ptr, staging_ptrs, pad_ptrs, signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr, HALF_BYTES: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """Block b writes x[b] + rank into slot b of every rank's row for this one."""
    rank = launched_rank(rank)
    page = page_of(pad_ptrs, rank)
    word = begin_call(page, pointer_to(staging_ptrs, rank, 0, tl.int64), signature, LANE_HALF_BYTES // 8)
    half = 2 * LANE_HALF_BYTES + ((word >> 32) & 1) * HALF_BYTES
    block = tl.program_id(0)
    for peer in tl.static_range(WORLD):
        row = pointer_to(staging_ptrs, peer, half + rank * 128, tl.int64)
        tl.store(row + block, tl.load(x_ptr + block) + rank)
    if SOME:
        publish_last_to(page, pad_ptrs, rank, active_ranks(page, WORLD), 0, word, LANES)
    else:
        publish_last(page, pad_ptrs, rank, 0, word, WORLD, LANES)


@triton.jit
def _take_kernel(
    x_ptr, out_ptr, staging_ptrs, pad_ptrs, signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr, HALF_BYTES: tl.constexpr, SOME: tl.constexpr, GIVEN: tl.constexpr,
    TAKEN: tl.constexpr,
):  # fmt: skip
    """out[rank, b] = what all blocks of all ranks that take part gave, added up, for each block b."""
    rank = launched_rank(rank)
    page = page_of(pad_ptrs, rank)
    word = open_word(page, signature)
    half = 2 * LANE_HALF_BYTES + ((word >> 32) & 1) * HALF_BYTES
    if SOME:
        active = active_ranks(page, WORLD)
        stopped = await_active(page, active, 0, word, budget, LANES, ATOMIC_POLL)
    else:
        active = tl.full((), -1, tl.int64)
        stopped = await_ranks(page, 0, word, budget, WORLD, LANES, ATOMIC_POLL)
    if stopped == 0:
        total = tl.full((), 0, tl.int64)
        for source in tl.static_range(WORLD):
            counts = is_active(active, source).to(tl.int64)
            for block in tl.static_range(GIVEN):
                given_ptr = pointer_to(staging_ptrs, rank, half + source * 128, tl.int64) + block
                total += counts * tl.load(given_ptr)
        tl.store(out_ptr + rank * TAKEN + tl.program_id(0), total)
    finish_call(page, word)


def turn(arena, x, out, timeout=20.0, take=True, some=False):
    given = {"HALF_BYTES": arena.staging.layout.half_bytes, "SOME": some}
    epoch = launch_part(_give_kernel, GIVING, arena, CALL, timeout, None, x, out, **given)
    if take:
        launch_part(
            _take_kernel, TAKING, arena, CALL, timeout, epoch, x, out, GIVEN=GIVING, TAKEN=TAKING, **given
        )
        arena.channel.after_kernel(epoch)


def wanted(world, base):
    return world * sum(base + block for block in range(GIVING)) + GIVING * sum(range(world))


def _turns(member, epoch):
    arena = member.arena(64 << 10)
    at_epoch(member, arena, epoch)
    told = []
    for base in range(5):
        out = torch.zeros(member.world_size, TAKING, dtype=torch.int64)
        turn(arena, torch.arange(base, base + GIVING), out)
        told.append(out[member.rank].tolist())
    return told


@pytest.mark.parametrize(("world", "epoch"), [(2, 7), (4, LAST_CALLS_OF_A_WRAP)])
def test_each_block_that_takes_has_waited_for_all_blocks_that_gave(on_ranks, world, epoch):
    told = [[wanted(world, base)] * TAKING for base in range(5)]
    assert on_ranks(world, _turns, epoch) == [told] * world


@pytest.mark.parametrize("mode", ["grid", "streams"])
def test_virtual_ranks_take_turns_between_the_parts_of_a_call(mode):
    arena = VirtualArena(3, torch.device("cpu"), 64 << 10, mode)
    for base in range(3):
        out = torch.zeros(3, TAKING, dtype=torch.int64)
        turn(arena, torch.arange(base, base + GIVING), out)
        assert out.tolist() == [[wanted(3, base)] * TAKING] * 3


def _silent(member):
    arena = member.arena(64 << 10)
    out = torch.zeros(2, TAKING, dtype=torch.int64)
    if member.rank == 0:
        with pytest.raises(PeerTimeoutError, match="rank 1 is silent"):
            turn(arena, torch.arange(GIVING), out, timeout=0.3)
    member.meet("done")
    return out.any().item()


def test_a_part_that_waits_in_vain_is_over_at_its_deadline(on_ranks):
    assert on_ranks(2, _silent) == [False, False]


def _some(member):
    """Rank 1 is left out and does not come, and nobody minds; then it is not left out, and is named."""
    arena = member.arena(64 << 10)
    words, out = arena.channel.words, torch.zeros(3, TAKING, dtype=torch.int64)
    words[Word.LEFT_OUT] = 0b010
    member.meet("begun")
    before = [list(page.words) for page in arena.channel.pages]
    member.meet("looked")
    if member.rank != 1:
        turn(arena, torch.arange(GIVING), out, some=True)
    member.meet("done")
    untouched = list(arena.channel.pages[1].words) == before[1]
    member.meet("compared")
    words[Word.LEFT_OUT] = 0
    if member.rank == 0:
        with pytest.raises(PeerTimeoutError, match="rank 1 is silent") as caught:
            turn(arena, torch.arange(GIVING), out.clone(), timeout=0.3, some=True)
        assert caught.value.peers == (1,)
    if member.rank == 2:
        turn(arena, torch.arange(GIVING), out, take=False, some=True)
    member.meet("over")
    return untouched, out[member.rank].tolist()


def test_ranks_that_are_left_out_are_neither_told_nor_awaited(on_ranks):
    total = 2 * sum(range(GIVING)) + GIVING * (0 + 2)
    found = on_ranks(3, _some)
    assert found[0] == found[2] == (True, [total] * TAKING)
    assert found[1][1] == [0] * TAKING
