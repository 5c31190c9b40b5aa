"""Flag-in-data lanes: 32 bits of payload and the epoch in one 8-byte store, which arrives whole.

Two elements of 16 bits share a lane. Nothing else is ever written where lanes live, and `begin_call` renews
them in time, so a lane that carries the epoch of a call was written in that call.
"""

import triton
import triton.language as tl

from tcomm.kernels.device import accumulate, is_aborted, pause, pointer_to, record_late, rounded, started
from tcomm.memory import control

__all__ = ["push_lanes", "reduce_lanes"]

_EPOCH_MASK = tl.constexpr(control.EPOCH_MASK)
_LANES_OF = tl.constexpr(control.MAX_PHASES)


@triton.jit
def _num_words(numel, dtype: tl.constexpr):
    """32-bit words that hold `numel` elements."""
    return (numel * (dtype.primitive_bitwidth // 16) + 1) // 2


@triton.jit
def push_lanes(
    x_ptr, staging_ptrs, numel, rank, word,
    WORLD: tl.constexpr, BLOCK: tl.constexpr, LANE_HALF_BYTES: tl.constexpr,
):  # fmt: skip
    """Write x as lanes of this call into this rank's slot of every rank."""
    num_words = _num_words(numel, x_ptr.dtype.element_ty)
    slot = ((word >> 32) & 1) * LANE_HALF_BYTES + rank * (LANE_HALF_BYTES // WORLD)
    flag = word & ~_EPOCH_MASK
    tile = tl.program_id(0)
    while tile * BLOCK < num_words:
        offs = tile * BLOCK + tl.arange(0, BLOCK)
        lanes = flag | _packed(x_ptr, offs, numel)
        for step in tl.static_range(WORLD):
            dst_ptr = pointer_to(staging_ptrs, (rank + step + 1) % WORLD, slot, tl.int64)
            tl.store(dst_ptr + offs, lanes, mask=offs < num_words)
        tile += tl.num_programs(0)


@triton.jit
def reduce_lanes(
    out_ptr, lane_ptr, page, numel, word, budget,
    WORLD: tl.constexpr, BLOCK: tl.constexpr, LANE_HALF_BYTES: tl.constexpr,
    OP: tl.constexpr, ACC: tl.constexpr, ATOMIC_POLL: tl.constexpr,
):  # fmt: skip
    """Reduce the lanes that all ranks wrote here into out; gives up where `await_lanes` does."""
    dtype = out_ptr.dtype.element_ty
    num_words = _num_words(numel, dtype)
    half_ptr = lane_ptr + ((word >> 32) & 1) * (LANE_HALF_BYTES // 8)
    tile = tl.program_id(0)
    while tile * BLOCK < num_words:
        offs = tile * BLOCK + tl.arange(0, BLOCK)
        mask = offs < num_words
        bits = _await_lanes(half_ptr + offs, mask, page, 0, word, budget, ATOMIC_POLL)
        low = _element(bits, 0, dtype).to(ACC)
        high = _element(bits, 1, dtype).to(ACC)
        for source in tl.static_range(1, WORLD):
            slot_ptr = half_ptr + source * (LANE_HALF_BYTES // WORLD // 8)
            bits = _await_lanes(slot_ptr + offs, mask, page, source, word, budget, ATOMIC_POLL)
            low = accumulate(low, _element(bits, 0, dtype).to(ACC), OP)
            high = accumulate(high, _element(bits, 1, dtype).to(ACC), OP)
        if OP == "avg":
            low = low * (1.0 / WORLD)
            high = high * (1.0 / WORLD)
        if dtype.primitive_bitwidth == 16:
            tl.store(out_ptr + 2 * offs, rounded(low, dtype), mask=2 * offs < numel)
            tl.store(out_ptr + 2 * offs + 1, rounded(high, dtype), mask=2 * offs + 1 < numel)
        else:
            tl.store(out_ptr + offs, rounded(low, dtype), mask=offs < numel)
        tile += tl.num_programs(0)


@triton.jit
def _packed(x_ptr, offs, numel):
    """The 32-bit words `offs` of x, zero-extended to 64 bits."""
    if x_ptr.dtype.element_ty.primitive_bitwidth == 16:
        low = tl.load(x_ptr + 2 * offs, mask=2 * offs < numel, other=0).to(tl.uint16, bitcast=True)
        high = tl.load(x_ptr + 2 * offs + 1, mask=2 * offs + 1 < numel, other=0).to(tl.uint16, bitcast=True)
        return low.to(tl.int64) | (high.to(tl.int64) << 16)
    else:
        return tl.load(x_ptr + offs, mask=offs < numel, other=0).to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def _element(bits, half: tl.constexpr, dtype: tl.constexpr):
    """Element `half` (0 or 1) of each word; a 32-bit word has one, which is given for both."""
    if dtype.primitive_bitwidth == 16:
        return (bits >> (16 * half)).to(tl.uint16).to(dtype, bitcast=True)
    else:
        return bits.to(tl.uint32).to(dtype, bitcast=True)


@triton.jit
def _await_lanes(ptrs, mask, page, source, word, budget, ATOMIC_POLL: tl.constexpr):
    """The lanes at `ptrs`, once all of them carry the epoch of this call. Bounded, as `await_peers` is."""
    state = _state_of(_poll_lanes(ptrs, mask, ATOMIC_POLL), mask, word, 0)
    since = started(ATOMIC_POLL)
    polls = tl.full((), 0, tl.int64)
    given_up = tl.full((), 0, tl.int32)
    while state == 1:
        given_up = pause(_LANES_OF + source, tl.program_id(0), word, page, polls, since, budget, ATOMIC_POLL)
        polls += 1
        given_up = tl.where(is_aborted(page, word), 1, given_up)
        state = _state_of(_poll_lanes(ptrs, mask, ATOMIC_POLL), mask, word, given_up)
    if state > 1:
        record_late(page, source, word)
    # All have arrived: reading once more keeps the loop free of a carried vector (Triton 3.6).
    return _poll_lanes(ptrs, mask, ATOMIC_POLL)


@triton.jit
def _poll_lanes(ptrs, mask, ATOMIC_POLL: tl.constexpr):
    if ATOMIC_POLL:
        return tl.atomic_add(ptrs, 0, mask=mask, sem="acquire", scope="sys")
    else:
        return tl.load(ptrs, mask=mask, other=0, volatile=True)


@triton.jit
def _state_of(lanes, mask, word, given_up):
    """0 when all lanes have come, 1 when not, 2 or 3 when a warp has given up: one answer for all warps.

    Each warp reads the clock and the abort word for itself, and this program has barriers behind the wait.
    """
    stale = mask & (((lanes ^ word) & ~_EPOCH_MASK) != 0)
    return tl.max(stale.to(tl.int32) + 2 * given_up, axis=0)
