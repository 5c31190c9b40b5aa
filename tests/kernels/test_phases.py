import pytest
import torch
import triton
import triton.language as tl

from tcomm.errors import PeerTimeoutError
from tcomm.kernels.device import begin_call, finish_call, launched_rank, page_of, pointer_to
from tcomm.kernels.launch import launch_part
from tcomm.kernels.phases import await_ranks, open_word, publish_last
from tcomm.memory.virtual import VirtualArena
from tcomm.signature import CallDescription
from tests.kernels.test_device import LAST_CALLS_OF_A_WRAP, at_epoch

CALL = CallDescription("turn", "int64")
GIVING, TAKING = 3, 2


@triton.jit
def _give_kernel(
    x_ptr, out_ptr, staging_ptrs, pad_ptrs, signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr, HALF_BYTES: tl.constexpr,
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
    publish_last(page, pad_ptrs, rank, 0, word, WORLD, LANES)


@triton.jit
def _take_kernel(
    x_ptr, out_ptr, staging_ptrs, pad_ptrs, signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    VIRTUAL: tl.constexpr, HALF_BYTES: tl.constexpr, GIVEN: tl.constexpr, TAKEN: tl.constexpr,
):  # fmt: skip
    """out[rank, b] = what all blocks of all ranks gave, added up, for each block b."""
    rank = launched_rank(rank)
    page = page_of(pad_ptrs, rank)
    word = open_word(page, signature)
    half = 2 * LANE_HALF_BYTES + ((word >> 32) & 1) * HALF_BYTES
    if await_ranks(page, 0, word, budget, WORLD, LANES, ATOMIC_POLL) == 0:
        total = tl.full((), 0, tl.int64)
        for source in tl.static_range(WORLD):
            for block in tl.static_range(GIVEN):
                total += tl.load(pointer_to(staging_ptrs, rank, half + source * 128, tl.int64) + block)
        tl.store(out_ptr + rank * TAKEN + tl.program_id(0), total)
    finish_call(page, word)


def turn(arena, x, out, timeout=20.0, take=True):
    half_bytes = arena.staging.layout.half_bytes
    epoch = launch_part(_give_kernel, GIVING, arena, CALL, timeout, None, x, out, HALF_BYTES=half_bytes)
    if take:
        launch_part(
            _take_kernel, TAKING, arena, CALL, timeout, epoch, x, out,
            HALF_BYTES=half_bytes, GIVEN=GIVING, TAKEN=TAKING,
        )  # fmt: skip
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
