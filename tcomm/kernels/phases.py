"""A call made of several launches: one that gives, and others, later, that take.

Blocks of the launch that gives wait for nobody; the last of them publishes for all, as block 0. Each block
of a launch that takes waits for that one word of every rank: what it reads may be the work of any block.
The epoch advances in the last launch, so the ones before it leave the call open.

Calls that may go on without some ranks tell and await the set of those that take part, which each launch
reads anew: `active_ranks`.
"""

import triton
import triton.language as tl

from tcomm.kernels.device import arrivals_of, await_block, await_block_of_some, in_set
from tcomm.memory import control
from tcomm.memory.control import Word

__all__ = [
    "active_ranks",
    "await_active",
    "await_ranks",
    "is_active",
    "open_word",
    "publish_last",
    "publish_last_to",
]

_EPOCH = tl.constexpr(int(Word.EPOCH))
_BLOCKS_DONE = tl.constexpr(int(Word.BLOCKS_DONE))
_LEFT_OUT = tl.constexpr(int(Word.LEFT_OUT))
_EPOCH_MASK = tl.constexpr(control.EPOCH_MASK)


@triton.jit
def open_word(page, signature):
    """The word of the call that an earlier launch began."""
    epoch = (tl.load(page + _EPOCH) + 1) & _EPOCH_MASK
    return (epoch << 32) | signature


@triton.jit
def active_ranks(page, WORLD: tl.constexpr):
    """The set of ranks that take part, a bit for each: all but those that this rank leaves out.

    The word lies in the rank's own page, so that replays of a graph read it too.
    """
    return ((1 << WORLD) - 1) & (tl.load(page + _LEFT_OUT) ^ -1)


@triton.jit
def is_active(ranks, rank):
    """Whether `rank` is in the set `ranks`."""
    return ((ranks >> rank) & 1) != 0


@triton.jit
def publish_last(page, pad_ptrs, rank, phase, word, WORLD: tl.constexpr, LANES: tl.constexpr):
    """Tell every rank that this launch has come to `phase`, once all its blocks have come here."""
    _publish_last(page, pad_ptrs, rank, tl.arange(0, LANES) < WORLD, phase, word, LANES)


@triton.jit
def publish_last_to(page, pad_ptrs, rank, ranks, phase, word, LANES: tl.constexpr):
    """`publish_last`, to the ranks in the set `ranks` only; pages of others are not touched."""
    _publish_last(page, pad_ptrs, rank, in_set(ranks, LANES), phase, word, LANES)


@triton.jit
def _publish_last(page, pad_ptrs, rank, mask, phase, word, LANES: tl.constexpr):
    tl.debug_barrier()
    done = tl.atomic_add(page + _BLOCKS_DONE, 1, sem="acq_rel", scope="sys")
    if done == tl.num_programs(0) - 1:
        tl.store(page + _BLOCKS_DONE, 0)
        pages = tl.load(pad_ptrs + tl.arange(0, LANES), mask=mask, other=0).to(tl.pointer_type(tl.int64))
        words = tl.full((LANES,), 0, tl.int64) + word
        tl.debug_barrier()
        tl.atomic_xchg(
            pages + arrivals_of(phase, 0, word) + rank, words, mask=mask, sem="release", scope="sys"
        )


@triton.jit
def await_ranks(
    page, phase, word, budget,
    WORLD: tl.constexpr, LANES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
):  # fmt: skip
    """Wait until every rank has come to `phase` with all its blocks; 0 when so, else the kind of error."""
    return await_block(page, phase, 0, word, budget, WORLD, LANES, ATOMIC_POLL)


@triton.jit
def await_active(page, ranks, phase, word, budget, LANES: tl.constexpr, ATOMIC_POLL: tl.constexpr):
    """`await_ranks`, for the ranks in the set `ranks`, of which this one is."""
    return await_block_of_some(page, ranks, phase, 0, word, budget, LANES, ATOMIC_POLL)
