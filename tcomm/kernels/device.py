"""The words that kernels are written in. The contract behind them is `docs/memory-model.md`.

Everything here is plain `triton.language`: it compiles for CUDA and HIP, and runs in the interpreter. Three
rules that the compiler does not keep for us are kept here, once:

- Triton 3.6 to 3.8 put no CTA barrier before a releasing atomic, so `publish` and `await_peers` do.
- A spin on an ordinary load is deleted; on a volatile load it is not, except on AMD, where an acquiring
  atomic is polled (`ATOMIC_POLL`).
- A pointer out of a table is not known to be aligned until `tl.multiple_of` says so after the cast.
"""

import triton
import triton.language as tl

from tcomm.interpret import is_interpreted
from tcomm.kernels import hooks
from tcomm.kernels.device_cuda import nanoseconds
from tcomm.memory import control
from tcomm.memory.control import ErrorKind, HostWord, Word
from tcomm.memory.wait import SET_SHIFT

__all__ = [
    "INTERPRETED",
    "accumulate",
    "arrival_address",
    "arrivals_of",
    "await_block",
    "await_block_of_some",
    "await_peers",
    "await_some",
    "axis_rank",
    "begin_call",
    "finish_call",
    "in_set",
    "is_aborted",
    "launched_rank",
    "page_of",
    "pause",
    "pointer_to",
    "publish",
    "publish_to_some",
    "record_late",
    "rounded",
    "row_of",
    "started",
    "tell_host",
]

INTERPRETED = tl.constexpr(is_interpreted())

_POLLS_PER_LOOK = tl.constexpr(256)

_EPOCH = tl.constexpr(int(Word.EPOCH))
_BLOCKS_DONE = tl.constexpr(int(Word.BLOCKS_DONE))
_ABORT = tl.constexpr(int(Word.ABORT))
_ERROR_KIND = tl.constexpr(int(Word.ERROR_KIND))
_ERROR_PEER = tl.constexpr(int(Word.ERROR_PEER))
_ERROR_EXPECTED = tl.constexpr(int(Word.ERROR_EXPECTED))
_ERROR_SEEN = tl.constexpr(int(Word.ERROR_SEEN))
_ERROR_PHASE = tl.constexpr(int(Word.ERROR_PHASE))
_ERROR_BLOCK = tl.constexpr(int(Word.ERROR_BLOCK))
_HOST_RECORD = tl.constexpr(int(Word.HOST_RECORD))
_HOST_EXPECTED = tl.constexpr(int(HostWord.EXPECTED))
_HOST_SEEN = tl.constexpr(int(HostWord.SEEN))
_HOST_ABORT = tl.constexpr(int(HostWord.ABORT))
_MISMATCH = tl.constexpr(int(ErrorKind.MISMATCH))
_TIMEOUT = tl.constexpr(int(ErrorKind.TIMEOUT))
_ARRIVALS = tl.constexpr(control.ARRIVALS)
_MAX_BLOCKS = tl.constexpr(control.MAX_BLOCKS)
_MAX_WORLD = tl.constexpr(control.MAX_WORLD_SIZE)
_MAX_PHASES = tl.constexpr(control.MAX_PHASES)
_EPOCH_MASK = tl.constexpr(control.EPOCH_MASK)
_RENEWAL_MASK = tl.constexpr(control.RENEWAL_MASK)
_DEAD_EPOCH = tl.constexpr(control.DEAD_EPOCH)
_SET_SHIFT = tl.constexpr(SET_SHIFT)

if is_interpreted():
    axis_rank = hooks.axis_rank

    def pause(phase, block, word, page, polls, since, budget, ATOMIC_POLL):
        """Let peers run; the host has the clock, and polls are counted where there is a budget of them."""
        return hooks.pause(phase, block, word, polls, budget)
else:

    @triton.jit
    def axis_rank():
        """Which of the ranks of one launch this program works for."""
        return tl.program_id(1)

    @triton.jit
    def pause(phase, block, word, page, polls, since, budget, ATOMIC_POLL: tl.constexpr):
        """Between two polls of a compiled kernel: 1 when it has waited long enough, else 0.

        The clock and the host's abort word are looked at seldom: the one is slow, the other beyond a bus.
        """
        given_up = tl.full((), 0, tl.int32)
        if ATOMIC_POLL:
            given_up = (polls >= budget).to(tl.int32)
        elif polls % _POLLS_PER_LOOK == _POLLS_PER_LOOK - 1:
            given_up = (nanoseconds() - since >= budget).to(tl.int32)
            record = tl.load(page + _HOST_RECORD)
            if record != 0:
                abort_ptr = record.to(tl.pointer_type(tl.int64)) + _HOST_ABORT
                given_up = tl.where(tl.load(abort_ptr, volatile=True) != 0, 1, given_up)
        return given_up


@triton.jit
def started(ATOMIC_POLL: tl.constexpr):
    """When a wait begins, for `pause`: nanoseconds on CUDA; elsewhere polls, or the host's clock, count."""
    if INTERPRETED or ATOMIC_POLL:
        return tl.full((), 0, tl.int64)
    else:
        return nanoseconds()


@triton.jit
def launched_rank(rank):
    """The rank that this program works for: the first of the launch, and one more along the grid's y axis.

    64 bits wide: offsets that are multiples of it pass 2**31 in large staging.
    """
    return rank.to(tl.int64) + axis_rank()


@triton.jit
def row_of(ptr, stride, rank, VIRTUAL: tl.constexpr):
    """Where the tensor of `rank` begins. One tensor has all those of virtual ranks, `stride` elements apart.

    Rows begin at multiples of 16 bytes.
    """
    if VIRTUAL:
        # A hint on the pointer is lost where the compiler adds offsets up first.
        return ptr + tl.multiple_of(rank * stride, 128 // ptr.dtype.element_ty.primitive_bitwidth)
    else:
        return ptr


@triton.jit
def page_of(pad_ptrs, rank):
    """Control page of `rank`, as a pointer to its 64-bit words."""
    return tl.load(pad_ptrs + rank).to(tl.pointer_type(tl.int64))


@triton.jit
def pointer_to(buf_ptrs, holder, offset, dtype):
    """Pointer to `offset` bytes into the buffer of rank `holder`; the offset is a multiple of 16."""
    base = tl.load(buf_ptrs + holder) + offset
    return tl.multiple_of(base.to(tl.pointer_type(dtype)), 16)


@triton.jit
def begin_call(page, lane_ptr, signature, LANE_HALF_WORDS: tl.constexpr):
    """The word of this call, (epoch, signature); renews what a wrap of the epoch made stale."""
    epoch = (tl.load(page + _EPOCH) + 1) & _EPOCH_MASK
    if ((epoch & _RENEWAL_MASK) == 0) & (tl.program_id(0) == 0):
        other = (epoch + 1) & 1
        dead = (epoch ^ _DEAD_EPOCH) << 32
        offs = tl.arange(0, 512)
        for phase in tl.static_range(_MAX_PHASES):
            words = page + _ARRIVALS + (phase * 2 + other) * _MAX_BLOCKS * _MAX_WORLD
            tl.store(words + offs, tl.full((512,), 0, tl.int64) + dead)
        start = tl.full((), 0, tl.int32)
        while start < LANE_HALF_WORDS:
            mask = start + offs < LANE_HALF_WORDS
            lanes = lane_ptr + other * LANE_HALF_WORDS + start + offs
            tl.store(lanes, tl.full((512,), 0, tl.int64) + dead, mask=mask)
            start += 512
    return (epoch << 32) | signature


@triton.jit
def publish(pad_ptrs, rank, phase, word, WORLD: tl.constexpr, LANES: tl.constexpr):
    """Tell every rank that this block has come to `phase`, with all that it wrote before."""
    peers = tl.arange(0, LANES)
    mask = peers < WORLD
    pages = tl.load(pad_ptrs + peers, mask=mask, other=0).to(tl.pointer_type(tl.int64))
    slot = _arrivals(phase, word) + rank
    words = tl.full((LANES,), 0, tl.int64) + word
    tl.debug_barrier()
    tl.atomic_xchg(pages + slot, words, mask=mask, sem="release", scope="sys")


@triton.jit
def await_peers(
    page, phase, word, budget,
    WORLD: tl.constexpr, LANES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
):  # fmt: skip
    """Wait until this block of every rank has published `word`; 0 when so, else the kind of error."""
    block = tl.program_id(0)
    return await_block(page, phase, block, word, budget, WORLD, LANES, ATOMIC_POLL)


@triton.jit
def await_block(
    page, phase, block, word, budget,
    WORLD: tl.constexpr, LANES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
):  # fmt: skip
    """Wait until `block` of every rank has published `word`; 0 when so, else the kind of error.

    Bounded: by `budget` (nanoseconds on CUDA, else polls) when compiled, by the host's clock when
    interpreted. Polls this rank's own memory. An error goes into the error record, and the abort word makes
    the other blocks stop waiting.
    """
    mask = tl.arange(0, LANES) < WORLD
    return _await_lanes(page, mask, phase, phase, block, word, budget, True, LANES, ATOMIC_POLL)


@triton.jit
def await_block_of_some(
    page, ranks, phase, block, word, budget,
    LANES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
):  # fmt: skip
    """`await_block`, for the words of the ranks in the set `ranks`, which is not empty."""
    mask = in_set(ranks, LANES)
    told = phase | (ranks << _SET_SHIFT)
    return _await_lanes(page, mask, told, phase, block, word, budget, True, LANES, ATOMIC_POLL)


@triton.jit
def _await_lanes(
    page, mask, told, phase, block, word, budget,
    HEEDS_ABORT: tl.constexpr, LANES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
):  # fmt: skip
    """Wait for those words of `block` that `mask` says; `told` is what the host hears of it."""
    inbox = page + arrivals_of(phase, block, word) + tl.arange(0, LANES)
    epoch = (word >> 32) & _EPOCH_MASK
    waiting = _count_absent(inbox, mask, epoch, ATOMIC_POLL)
    since = started(ATOMIC_POLL)
    polls = tl.full((), 0, tl.int64)
    given_up = tl.full((), 0, tl.int32)
    while (waiting > 0) & (given_up == 0):
        given_up = pause(told, block, word, page, polls, since, budget, ATOMIC_POLL)
        polls += 1
        if HEEDS_ABORT:
            given_up = tl.where(is_aborted(page, word), 1, given_up)
        else:
            given_up = tl.where(is_aborted(page, word) & (block > 0), 1, given_up)
        waiting = _count_absent(inbox, mask, epoch, ATOMIC_POLL)
    return _acquire(page, inbox, mask, epoch, phase, word, LANES)


@triton.jit
def _acquire(page, inbox, mask, epoch, phase, word, LANES: tl.constexpr):
    """What the words waited for come to: 0, or the kind of an error, which is recorded."""
    # Polls order nothing; this reads the words again, with acquire.
    seen = tl.atomic_add(inbox, 0, mask=mask, sem="acquire", scope="sys")
    tl.debug_barrier()
    late = mask & (((seen >> 32) & _EPOCH_MASK) != epoch)
    differs = mask & (seen != word) & (late == 0)
    kind = tl.where(tl.sum(differs.to(tl.int32), axis=0) > 0, _MISMATCH, 0)
    kind = tl.where((kind == 0) & (tl.sum(late.to(tl.int32), axis=0) > 0), _TIMEOUT, kind)
    if kind != 0:
        _record(page, phase, word, seen, kind, tl.where(kind == _MISMATCH, differs, late), LANES)
    return kind


@triton.jit
def is_aborted(page, word):
    """Whether another block of this launch has given the call up."""
    return tl.load(page + _ABORT, volatile=True) == _abort_of(word)


@triton.jit
def _abort_of(word):
    """What the abort word holds when the call of `word` was given up. Its epoch, so nothing resets it."""
    return ((word >> 32) & _EPOCH_MASK) | (1 << 32)


@triton.jit
def finish_call(page, word):
    """Advance the epoch, once all blocks of this launch are done with it: the last one stores it."""
    tl.debug_barrier()
    done = tl.atomic_add(page + _BLOCKS_DONE, 1, sem="acq_rel", scope="gpu")
    if done == tl.num_programs(0) - 1:
        tl.store(page + _BLOCKS_DONE, 0)
        tl.store(page + _EPOCH, (word >> 32) & _EPOCH_MASK)


@triton.jit
def arrivals_of(phase, block, word):
    """Index of the first arrival word of `block` for `phase` and the parity of the call."""
    row = (phase * 2 + ((word >> 32) & 1)) * _MAX_BLOCKS + block
    return _ARRIVALS + row * _MAX_WORLD


@triton.jit
def _arrivals(phase, word):
    return arrivals_of(phase, tl.program_id(0), word)


@triton.jit
def _count_absent(inbox, mask, epoch, ATOMIC_POLL: tl.constexpr):
    """How many ranks have not published this epoch yet."""
    if ATOMIC_POLL:
        seen = tl.atomic_add(inbox, 0, mask=mask, sem="acquire", scope="sys")
    else:
        seen = tl.load(inbox, mask=mask, other=0, volatile=True)
    absent = mask & (((seen >> 32) & _EPOCH_MASK) != epoch)
    return tl.sum(absent.to(tl.int32), axis=0)


@triton.jit
def _record(page, phase, word, seen, kind, culprits, LANES: tl.constexpr):
    """Put the first error of a call into the error record; later ones are lost on purpose."""
    lanes = tl.arange(0, LANES)
    peer = tl.min(tl.where(culprits, lanes, LANES), axis=0)
    theirs = tl.sum(tl.where(lanes == peer, seen, 0), axis=0)
    _claim_record(page, phase, word, theirs, kind, peer)


@triton.jit
def record_late(page, peer, word):
    """Put down that the data of `peer` did not come, though its arrival word did."""
    kind = tl.full((), _TIMEOUT, tl.int32)
    _claim_record(page, 0, word, tl.full((), 0, tl.int64), kind, tl.full((), 0, tl.int32) + peer)


@triton.jit
def _claim_record(page, phase, word, theirs, kind, peer):
    before = tl.atomic_cas(page + _ERROR_KIND, tl.full((), 0, tl.int64), kind.to(tl.int64), scope="sys")
    if before == 0:
        tl.store(page + _ERROR_PEER, peer.to(tl.int64))
        tl.store(page + _ERROR_EXPECTED, word)
        tl.store(page + _ERROR_SEEN, theirs)
        tl.store(page + _ERROR_PHASE, tl.full((), 0, tl.int64) + phase)
        tl.store(page + _ERROR_BLOCK, tl.program_id(0).to(tl.int64))
        tell_host(page, kind, peer, word, theirs, tl.full((), 0, tl.int64) + phase)
    tl.atomic_xchg(page + _ABORT, _abort_of(word), sem="release", scope="gpu")


@triton.jit
def tell_host(page, kind, peer, word, theirs, phase):
    """Repeat the error record where the host can read it while the GPU works; what counts is one word."""
    record = tl.load(page + _HOST_RECORD)
    if record != 0:
        host = record.to(tl.pointer_type(tl.int64))
        tl.store(host + _HOST_EXPECTED, word)
        tl.store(host + _HOST_SEEN, theirs)
        block = tl.program_id(0).to(tl.int64)
        tl.store(host, kind.to(tl.int64) | (peer.to(tl.int64) << 8) | (phase << 16) | (block << 24))


@triton.jit
def accumulate(acc, value, OP: tl.constexpr):
    """One more rank's values onto those of the ranks before it."""
    if OP == "max":
        return tl.where((acc > value) | (acc != acc), acc, value)
    elif OP == "min":
        return tl.where((acc < value) | (acc != acc), acc, value)
    else:
        return acc + value


@triton.jit
def rounded(acc, dtype: tl.constexpr):
    """`acc` in `dtype`, to nearest even; the interpreter's own cast to bfloat16 truncates."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = acc.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where(acc != acc, 0x7FC0, nearest)
        return nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return acc.to(dtype)


@triton.jit
def in_set(ranks, LANES: tl.constexpr):
    """Which lanes stand for a rank in the set `ranks`, a bit for each."""
    return ((ranks >> tl.arange(0, LANES)) & 1) != 0


@triton.jit
def arrival_address(pad_ptrs, rank, source, phase, word):
    """Address of the word in which `source` tells `rank` that this block has come to `phase`."""
    return tl.load(pad_ptrs + rank) + (_arrivals(phase, word) + source) * 8


@triton.jit
def publish_to_some(pad_ptrs, rank, ranks, phase, word, LANES: tl.constexpr):
    """`publish`, to the ranks in the set `ranks` only; pages of others are not touched."""
    mask = in_set(ranks, LANES)
    pages = tl.load(pad_ptrs + tl.arange(0, LANES), mask=mask, other=0).to(tl.pointer_type(tl.int64))
    slot = _arrivals(phase, word) + rank
    words = tl.full((LANES,), 0, tl.int64) + word
    tl.debug_barrier()
    tl.atomic_xchg(pages + slot, words, mask=mask, sem="release", scope="sys")


@triton.jit
def await_some(page, ranks, phase, word, budget, LANES: tl.constexpr, ATOMIC_POLL: tl.constexpr):
    """`await_peers`, for the words of the ranks in the set `ranks`, which is not empty.

    Block 0 waits whatever others found: what it hears in a later stage has to reach all ranks.
    """
    mask = in_set(ranks, LANES)
    told = phase | (ranks << _SET_SHIFT)
    block = tl.program_id(0)
    return _await_lanes(page, mask, told, phase, block, word, budget, False, LANES, ATOMIC_POLL)
