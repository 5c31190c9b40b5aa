"""A call made of several launches: one that gives, and others, later, that take.

Blocks of the launch that gives wait for nobody; the last of them publishes for all, as block 0. Each block
of a launch that takes waits for that one word of every rank: what it reads may be the work of any block.
The epoch advances in the last launch, so the ones before it leave the call open.
"""

import triton
import triton.language as tl

from tcomm.kernels.device import arrivals_of, await_block
from tcomm.memory import control
from tcomm.memory.control import Word

__all__ = ["await_ranks", "open_word", "publish_last"]

_EPOCH = tl.constexpr(int(Word.EPOCH))
_BLOCKS_DONE = tl.constexpr(int(Word.BLOCKS_DONE))
_EPOCH_MASK = tl.constexpr(control.EPOCH_MASK)


@triton.jit
def open_word(page, signature):
    """The word of the call that an earlier launch began."""
    epoch = (tl.load(page + _EPOCH) + 1) & _EPOCH_MASK
    return (epoch << 32) | signature


@triton.jit
def publish_last(page, pad_ptrs, rank, phase, word, WORLD: tl.constexpr, LANES: tl.constexpr):
    """Tell every rank that this launch has come to `phase`, once all its blocks have come here."""
    tl.debug_barrier()
    done = tl.atomic_add(page + _BLOCKS_DONE, 1, sem="acq_rel", scope="sys")
    if done == tl.num_programs(0) - 1:
        tl.store(page + _BLOCKS_DONE, 0)
        peers = tl.arange(0, LANES)
        mask = peers < WORLD
        pages = tl.load(pad_ptrs + peers, mask=mask, other=0).to(tl.pointer_type(tl.int64))
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
