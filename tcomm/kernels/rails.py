"""What goes between nodes: rank (node n, place l) exchanges with rank (m, l) of every other node m.

These are its rail. Only NVSHMEM reaches them: a rank's arrival word travels behind its data in one put with
signal, and is polled like the words that mates on this node store.
"""

import triton
import triton.language as tl

from tcomm.kernels.device import arrival_address, await_some
from tcomm.kernels.device_nvshmem import (
    CMP_EQ,
    SIGNAL_SET,
    put_signal_nbi,
    quiet,
    signal_op,
    signal_wait_until,
)
from tcomm.memory.control import ErrorKind

__all__ = ["await_rails", "mates_of", "send_on_rails", "spoiled_unless", "worse"]

_TIMEOUT = tl.constexpr(int(ErrorKind.TIMEOUT))


@triton.jit
def mates_of(rank, LOCAL: tl.constexpr):
    """The ranks of this node, this one included, as a set: a bit for each."""
    return (tl.full((), (1 << LOCAL) - 1, tl.int64)) << (rank // LOCAL * LOCAL)


@triton.jit
def worse(kind, other):
    """What a rank knows after two stages of a call: the first error, but a missed deadline in any case."""
    return tl.where((kind == 0) | (other == _TIMEOUT), other, kind)


@triton.jit
def spoiled_unless(good, word):
    """`word`, or one of its epoch that nobody has: so those hear of a disagreement who have not seen it."""
    return tl.where(good, word, word ^ 1)


@triton.jit
def send_on_rails(
    address, nbytes, pad_ptrs, pes_ptr, rank, word, told, WORLD: tl.constexpr, NODES: tl.constexpr
):
    """Put the bytes at `address` to the same place at every rank of this rail, then tell it `told`.

    Afterwards they have arrived: an operation that is only posted may wait for more of its kind.
    """
    signal = arrival_address(pad_ptrs, rank, rank, 0, word)
    tl.debug_barrier()
    for step in tl.static_range(1, NODES):
        pe = tl.load(pes_ptr + (rank + step * (WORLD // NODES)) % WORLD).to(tl.int32)
        if nbytes > 0:
            put_signal_nbi(address, address, nbytes, signal, told, SIGNAL_SET, pe)
        else:
            signal_op(signal, told, SIGNAL_SET, pe)
    quiet()


@triton.jit
def await_rails(
    page, pad_ptrs, rank, word, budget,
    WORLD: tl.constexpr, LANES: tl.constexpr, NODES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
):  # fmt: skip
    """Wait until every rank of this rail has sent; 0 when so, else the kind of error. Bounded."""
    ranks = tl.full((), 0, tl.int64)
    for step in tl.static_range(1, NODES):
        ranks |= tl.full((), 1, tl.int64) << (rank + step * (WORLD // NODES)) % WORLD
    kind = await_some(page, ranks, 0, word, budget, LANES, ATOMIC_POLL)
    if kind == 0:
        # They are there, so this returns; a network card's stores are in order only after it.
        for step in tl.static_range(1, NODES):
            source = (rank + step * (WORLD // NODES)) % WORLD
            signal_wait_until(arrival_address(pad_ptrs, rank, source, 0, word), CMP_EQ, word)
        tl.debug_barrier()
    return kind
