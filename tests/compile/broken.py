"""Small kernels that are sound, and that every constant from `SOUND` away breaks in one way."""

import triton
import triton.language as tl

from tcomm.kernels.device import page_of, pause, started
from tcomm.kernels.device_cuda import alias_fence, multimem_load_sum, nanoseconds
from tcomm.memory.control import ARRIVALS, Word

_ARRIVALS = tl.constexpr(ARRIVALS)
_EPOCH = tl.constexpr(int(Word.EPOCH))
_ABORT = tl.constexpr(int(Word.ABORT))
_ERROR_KIND = tl.constexpr(int(Word.ERROR_KIND))
_BLOCKS_DONE = tl.constexpr(int(Word.BLOCKS_DONE))

SOUND = {
    "WORLD": 4,
    "BLOCK": 4096,
    "PUBLISH_SEM": "release",
    "PUBLISH_SCOPE": "sys",
    "PUBLISH_BARRIER": True,
    "POLL": "volatile",
    "CLOCK": "pause",
    "ACQUIRE_SEM": "acquire",
    "ACQUIRE_SCOPE": "sys",
    "ACQUIRE_BARRIER": True,
    "LOAD_LATE": True,
    "ALIGNED": True,
    "DONE_SCOPE": "gpu",
}
SOUND_MULTIMEM = {
    "WORLD": 4,
    "BLOCK": 1024,
    "ADDRESS": "multicast",
    "MASKED": True,
    "FENCE": "between",
    "LOAD_LATE": True,
}
SOUND_LANES = {"WORLD": 2, "BLOCK": 1024, "SPLIT": False, "CACHED": False}
SOUND_ARITHMETIC = {"BLOCK": 1024, "SORT": "sound"}


@triton.jit
def _staged(staging_ptrs, holder, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    ptr = tl.load(staging_ptrs + holder).to(tl.pointer_type(dtype))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def _copy(src_ptr, dst_ptr, numel, BLOCK: tl.constexpr):
    tile = tl.program_id(0)
    while tile < numel // BLOCK:
        offs = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(dst_ptr + offs, tl.load(src_ptr + offs))
        tile += tl.num_programs(0)


@triton.jit
def _absent(inbox, word, POLL: tl.constexpr):
    if POLL == "atomic":
        seen = tl.atomic_add(inbox, 0, sem="acquire", scope="sys")
    elif POLL == "atomic gpu":
        seen = tl.atomic_add(inbox, 0, sem="acquire", scope="gpu")
    else:
        seen = tl.load(inbox, volatile=POLL == "volatile")
    return tl.sum((seen != word).to(tl.int32), axis=0)


@triton.jit
def _spin(page, inbox, word, budget, POLL: tl.constexpr, CLOCK: tl.constexpr):
    waiting = _absent(inbox, word, POLL)
    given_up = tl.full((), False, tl.int1)
    polls = tl.full((), 0, tl.int64)
    since = started(CLOCK == "none")
    while (waiting > 0) & (given_up == 0):
        given_up = tl.load(page + _ABORT, volatile=POLL != "plain") == word
        if CLOCK == "pause":
            given_up |= pause(0, 0, word, page, polls, since, budget, False) != 0
        elif CLOCK == "no abort":
            given_up |= nanoseconds() - since >= budget
        polls += 1
        waiting = _absent(inbox, word, POLL)


@triton.jit
def _acquire(page, inbox, word, SEM: tl.constexpr, SCOPE: tl.constexpr, BARRIER: tl.constexpr):
    seen = tl.atomic_add(inbox, 0, sem=SEM, scope=SCOPE)
    if BARRIER:
        tl.debug_barrier()
        if tl.sum((seen != word).to(tl.int32), axis=0) > 0:
            tl.atomic_cas(page + _ERROR_KIND, tl.full((), 0, tl.int64), word, scope="sys")
            tl.atomic_xchg(page + _ABORT, word, sem="release", scope="gpu")


@triton.jit
def model_kernel(
    x_ptr, out_ptr, numel, staging_ptrs, pad_ptrs, signature, rank, budget,
    WORLD: tl.constexpr, BLOCK: tl.constexpr,
    PUBLISH_SEM: tl.constexpr, PUBLISH_SCOPE: tl.constexpr, PUBLISH_BARRIER: tl.constexpr,
    POLL: tl.constexpr, CLOCK: tl.constexpr, ACQUIRE_SEM: tl.constexpr, ACQUIRE_SCOPE: tl.constexpr,
    ACQUIRE_BARRIER: tl.constexpr, LOAD_LATE: tl.constexpr, ALIGNED: tl.constexpr, DONE_SCOPE: tl.constexpr,
):  # fmt: skip
    page = page_of(pad_ptrs, rank)
    word = ((tl.load(page + _EPOCH) + 1) << 32) | signature
    peers = tl.arange(0, WORLD)
    mine = _staged(staging_ptrs, rank, x_ptr.dtype.element_ty, ALIGNED)
    theirs = _staged(staging_ptrs, (rank + 1) % WORLD, x_ptr.dtype.element_ty, ALIGNED)
    _copy(x_ptr, mine, numel, BLOCK)
    if not LOAD_LATE:
        _copy(theirs, out_ptr, numel, BLOCK)
    if PUBLISH_BARRIER:
        tl.debug_barrier()
    pages = tl.load(pad_ptrs + peers).to(tl.pointer_type(tl.int64))
    words = tl.full((WORLD,), 0, tl.int64) + word
    tl.atomic_xchg(pages + _ARRIVALS + rank, words, sem=PUBLISH_SEM, scope=PUBLISH_SCOPE)
    _spin(page, page + _ARRIVALS + peers, word, budget, POLL, CLOCK)
    _acquire(page, page + _ARRIVALS + peers, word, ACQUIRE_SEM, ACQUIRE_SCOPE, ACQUIRE_BARRIER)
    if LOAD_LATE:
        _copy(theirs, out_ptr, numel, BLOCK)
    tl.debug_barrier()
    done = tl.atomic_add(page + _BLOCKS_DONE, 1, sem="acq_rel", scope=DONE_SCOPE)
    if done == tl.num_programs(0) - 1:
        tl.store(page + _BLOCKS_DONE, 0)


@triton.jit
def lanes_kernel(
    x_ptr, out_ptr, numel, staging_ptrs, pad_ptrs, signature, rank, budget,
    WORLD: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, CACHED: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    while tile < numel // BLOCK:
        offs = tile * BLOCK + tl.arange(0, BLOCK)
        bits = tl.load(x_ptr + offs).to(tl.int32, bitcast=True)
        for peer in tl.static_range(WORLD):
            dst_ptr = _staged(staging_ptrs, peer, tl.int64, True)
            if SPLIT:
                half_ptr = (dst_ptr + offs).to(tl.pointer_type(tl.int32), bitcast=True)
                tl.store(half_ptr, bits)
                tl.debug_barrier()
                tl.store(half_ptr + 1, signature.to(tl.int32))
            else:
                tl.store(dst_ptr + offs, bits.to(tl.int64) | (signature << 32))
        tile += tl.num_programs(0)
    offs = tl.arange(0, BLOCK)
    lanes = tl.load(_staged(staging_ptrs, rank, tl.int64, True) + offs, volatile=not CACHED)
    tl.store(out_ptr + offs, lanes.to(tl.int32).to(tl.float32, bitcast=True))


@triton.jit
def arithmetic_kernel(
    x_ptr, out_ptr, numel, staging_ptrs, pad_ptrs, signature, rank, budget,
    BLOCK: tl.constexpr, SORT: tl.constexpr,
):  # fmt: skip
    offs = tl.arange(0, BLOCK)
    a = tl.load(x_ptr + offs)
    b = tl.load(x_ptr + BLOCK + offs)
    if SORT == "divided":
        c = (a + b) / 3
    elif SORT == "maximum":
        c = tl.maximum(a, b)
    elif SORT == "fused":
        c = a * b + a
    elif SORT == "flushed":
        c = tl.inline_asm_elementwise("add.ftz.f32 $0, $1, $2;", "=r,r,r", [a, b], tl.float32, True, 1)
    else:
        c = tl.where((a > b) | (a != a), a, b) * (1.0 / 3)
    tl.store(out_ptr + offs, c)


@triton.jit
def crowded_kernel(
    x_ptr, out_ptr, numel, staging_ptrs, pad_ptrs, signature, rank, budget,
    BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.arange(0, BLOCK)
    value = tl.load(x_ptr + offs)
    tl.debug_barrier()
    scale = tl.load(x_ptr + tl.sum((value > 0).to(tl.int32), axis=0))
    tl.store(out_ptr + offs, value * scale)


@triton.jit
def _sum_vectors(multicast_ptr, staging_ptrs, out_ptr, numel, BLOCK: tl.constexpr, ADDRESS, MASKED):
    """16 bytes of every vector: full tiles in a loop, and what is left over."""
    base = multicast_ptr
    if ADDRESS == "staging":
        base = tl.load(staging_ptrs)
    tile = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK // 4)
    while tile < numel // BLOCK:
        _sum_vector(base + (tile * BLOCK + lanes * 4) * 4, lanes, out_ptr, tile * BLOCK, ADDRESS, True)
        tile += tl.num_programs(0)
    _sum_vector(
        base + (tile * BLOCK + lanes * 4) * 4, tile * BLOCK + lanes * 4 < numel, out_ptr, tile * BLOCK,
        ADDRESS, not MASKED,
    )  # fmt: skip


@triton.jit
def _sum_vector(address, mask, out_ptr, start, ADDRESS: tl.constexpr, FULL: tl.constexpr):
    if ADDRESS == "none":
        a = mask.to(tl.int32)
    else:
        a, _, _, _ = multimem_load_sum(address, mask, tl.float32, FULL)
    if ADDRESS == "plain":
        a += tl.load(address.to(tl.pointer_type(tl.int32)))
    offs = start + tl.arange(0, address.shape[0])
    tl.store(out_ptr + offs, a.to(tl.float32, bitcast=True))


@triton.jit
def multimem_kernel(
    x_ptr, out_ptr, numel, multicast_ptr, staging_ptrs, pad_ptrs, signature, rank, budget,
    WORLD: tl.constexpr, BLOCK: tl.constexpr, ADDRESS: tl.constexpr, MASKED: tl.constexpr,
    FENCE: tl.constexpr, LOAD_LATE: tl.constexpr,
):  # fmt: skip
    page = page_of(pad_ptrs, rank)
    word = ((tl.load(page + _EPOCH) + 1) << 32) | signature
    peers = tl.arange(0, WORLD)
    _copy(x_ptr, _staged(staging_ptrs, rank, x_ptr.dtype.element_ty, True), numel, BLOCK)
    if not LOAD_LATE:
        _sum_vectors(multicast_ptr, staging_ptrs, out_ptr, numel, BLOCK, ADDRESS, MASKED)
    tl.debug_barrier()
    if FENCE == "early":
        alias_fence()
    pages = tl.load(pad_ptrs + peers).to(tl.pointer_type(tl.int64))
    words = tl.full((WORLD,), 0, tl.int64) + word
    tl.atomic_xchg(pages + _ARRIVALS + rank, words, sem="release", scope="sys")
    _spin(page, page + _ARRIVALS + peers, word, budget, "volatile", "pause")
    _acquire(page, page + _ARRIVALS + peers, word, "acquire", "sys", True)
    if FENCE == "between":
        alias_fence()
    if LOAD_LATE:
        _sum_vectors(multicast_ptr, staging_ptrs, out_ptr, numel, BLOCK, ADDRESS, MASKED)
    tl.debug_barrier()
    if FENCE == "late":
        alias_fence()
