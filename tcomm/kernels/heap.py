"""NVSHMEM for interpreted kernels: the symmetric heap of real processes in the memory of one host.

Each function has the name and the arguments of a binding in `device_nvshmem.py`, and does to shared memory
what that does to the memory of another GPU. Addresses are those of this process: a symmetric address of this
rank means, at another PE, the same offset into the same buffer of that PE.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from triton._C.libtriton import interpreter

from tcomm.kernels import hooks
from tcomm.memory.base import SymmetricBuffer
from tcomm.memory.control import ARRIVALS, MAILBOXES, MAX_PHASES, MAX_WORLD_SIZE

__all__ = [
    "Heap",
    "barrier",
    "fence",
    "get",
    "mapped",
    "my_pe",
    "n_pes",
    "ptr",
    "put",
    "put_nbi",
    "put_signal",
    "put_signal_nbi",
    "quiet",
    "signal_op",
    "signal_wait_until",
]

_SIGNAL_SET = 9
_COMPARISONS: dict[int, Callable[[int, int], bool]] = {
    0: lambda seen, value: seen == value,
    1: lambda seen, value: seen != value,
    2: lambda seen, value: seen > value,
    3: lambda seen, value: seen <= value,
    4: lambda seen, value: seen < value,
    5: lambda seen, value: seen >= value,
}


@dataclasses.dataclass
class Heap:
    """What interpreted kernels take for the symmetric memory of NVSHMEM.

    Attributes:
        rank: this process, within the group.
        pes: PE of each rank.
        control: control pages; signals that are waited for lie among their arrival words.
        others: more symmetric memory: staging.
        near: ranks that loads and stores reach, besides this one; `ptr` gives 0 for all others.
        sync: a word for every rank, for `barrier`.
    """

    rank: int
    pes: Sequence[int]
    control: SymmetricBuffer
    others: Sequence[SymmetricBuffer]
    near: frozenset[int] = frozenset()
    sync: SymmetricBuffer | None = None
    generation: int = 0
    traffic: collections.Counter[tuple[str, int]] = dataclasses.field(default_factory=collections.Counter)
    """How often each binding was called for each PE."""

    def translate(self, address: int, pe: int) -> int:
        """Where what lies here at the symmetric `address` lies at `pe`, as an address of this process."""
        buffer, offset = self._find(address)
        return int(buffer.table[self.pes.index(pe)]) + offset

    def _find(self, address: int) -> tuple[SymmetricBuffer, int]:
        for buffer in (self.control, *self.others, *filter(None, [self.sync])):
            offset = address - int(buffer.table[self.rank])
            if 0 <= offset < buffer.nbytes:
                return buffer, offset
        raise RuntimeError(f"{address:#x} is no symmetric address of rank {self.rank}")

    def source_of(self, address: int) -> int:
        """The rank that writes the arrival word at `address`."""
        buffer, offset = self._find(address)
        if buffer is not self.control or not ARRIVALS <= offset // 8 < MAILBOXES:
            raise RuntimeError(f"{address:#x} is no arrival word; a wait for it would have nobody to blame")
        return (offset // 8 - ARRIVALS) % MAX_WORLD_SIZE


_heap: Heap | None = None


@contextlib.contextmanager
def mapped(heap: Heap) -> Iterator[Heap]:
    """While kernels that are interpreted use `heap`; inside of `hooks.interpreting`, which lets one in."""
    global _heap  # noqa: PLW0603 - guarded by the lock of `interpreting`
    _heap = heap
    try:
        yield heap
    finally:
        _heap = None


def _mapped(name: str, pe: int | None = None) -> Heap:
    if _heap is None:
        raise RuntimeError(f"an interpreted kernel calls {name} outside of `mapped`")
    if pe is not None:
        if pe not in _heap.pes:
            raise RuntimeError(f"{name} to PE {pe}, which is not among {list(_heap.pes)}")
        _heap.traffic[name, pe] += 1
    return _heap


def _ints(*values: Any) -> list[int]:
    """What an interpreted kernel gives, as plain numbers."""
    return [int(value) if handle is None else int(handle.data.item()) for value, handle in _handles(values)]


def _handles(values: Sequence[Any]) -> list[tuple[Any, Any]]:
    return [(value, getattr(value, "handle", None)) for value in values]


def _store_word(address: int, value: int, operation: int) -> None:
    """Set the word, or add to it, in one step that other processes see after all that was written before."""
    kind = interpreter.RMW_OP.XCHG if operation == _SIGNAL_SET else interpreter.RMW_OP.ADD
    value = (value + 2**63) % 2**64 - 2**63
    where, what = np.array([address], np.uint64), np.array([value], np.int64)
    interpreter.atomic_rmw(kind, where, what, np.array([True]), interpreter.MEM_SEMANTIC.RELEASE)


def _load_word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def put(dst: Any, src: Any, nbytes: Any, pe: Any) -> int:
    """Copy local memory at `src` to the symmetric address `dst` of `pe`."""
    dst, src, nbytes, pe = _ints(dst, src, nbytes, pe)
    ctypes.memmove(_mapped("put", pe).translate(dst, pe), src, nbytes)
    return 0


put_nbi = put


def get(dst: Any, src: Any, nbytes: Any, pe: Any) -> int:
    """Copy from the symmetric address `src` of `pe` to local memory at `dst`."""
    dst, src, nbytes, pe = _ints(dst, src, nbytes, pe)
    ctypes.memmove(dst, _mapped("get", pe).translate(src, pe), nbytes)
    return 0


def put_signal(dst: Any, src: Any, nbytes: Any, signal: Any, value: Any, operation: Any, pe: Any) -> int:
    """`put`, and after the data the word at the symmetric address `signal` of `pe`."""
    dst, src, nbytes, signal, value, operation, pe = _ints(dst, src, nbytes, signal, value, operation, pe)
    heap = _mapped("put_signal", pe)
    ctypes.memmove(heap.translate(dst, pe), src, nbytes)
    _store_word(heap.translate(signal, pe), value, operation)
    return 0


put_signal_nbi = put_signal


def signal_op(signal: Any, value: Any, operation: Any, pe: Any) -> int:
    """Set, or add to, the word at the symmetric address `signal` of `pe`."""
    signal, value, operation, pe = _ints(signal, value, operation, pe)
    _store_word(_mapped("signal_op", pe).translate(signal, pe), value, operation)
    return 0


def signal_wait_until(signal: Any, comparison: Any, value: Any) -> int:
    """Wait until the own arrival word at `signal` compares so; returns what it holds, also when given up."""
    signal, comparison, value = _ints(signal, comparison, value)
    value %= 2**64
    holds = _COMPARISONS[comparison]
    return _poll(
        signal, lambda seen: holds(seen, value), _mapped("signal_wait_until").source_of(signal), value
    )


def _poll(address: int, enough: Callable[[int], bool], source: int, word: int) -> int:
    seen = _load_word(address)
    while not enough(seen):
        given_up = hooks.pause(MAX_PHASES + source, 0, word)
        seen = _load_word(address)
        if given_up:
            break
    return seen


def fence() -> int:
    """Nothing: every copy here is complete, and in order."""
    _mapped("fence")
    return 0


def quiet() -> int:
    """Nothing: every copy here is complete."""
    _mapped("quiet")
    return 0


def barrier() -> int:
    """Wait until all PEs have come."""
    heap = _mapped("barrier")
    if heap.sync is None:
        raise RuntimeError("this heap has no words for a barrier")
    heap.generation += 1
    mine = int(heap.sync.table[heap.rank])
    for pe in heap.pes:
        _store_word(heap.translate(mine + 8 * heap.rank, pe), heap.generation, _SIGNAL_SET)
    for source in range(len(heap.pes)):
        _poll(mine + 8 * source, lambda seen: seen >= heap.generation, source, heap.generation)
    return 0


def my_pe() -> int:
    """PE of this process."""
    heap = _mapped("my_pe")
    return heap.pes[heap.rank]


def n_pes() -> int:
    """Number of PEs."""
    return len(_mapped("n_pes").pes)


def ptr(address: Any, pe: Any) -> int:
    """Address by which loads and stores reach the symmetric `address` of `pe`; 0 where they do not."""
    address, pe = _ints(address, pe)
    heap = _mapped("ptr", pe)
    reached = heap.pes.index(pe) in heap.near | {heap.rank}
    return heap.translate(address, pe) if reached else 0
