"""NVSHMEM's device functions for Triton kernels, made from one table.

Every function takes 64-bit addresses, as integers, and is called by the whole program: block-scoped functions
need all its threads, and of the others one thread calls for all, between two CTA barriers. A void function
returns a number that means nothing, because Triton has no other way to declare it.

Interpreted, the same names are functions over the memory of one host (`heap.py`).

A kernel that uses them links `nvshmem_bitcode.find_bitcode`, and its module is initialised before the first
launch (`nvshmem_modules.py`). Waits inside NVSHMEM have no deadline: poll first, and call `signal_wait_until`
when it can only return, for the ordering that it brings.
"""

import dataclasses

import triton
import triton.language as tl
from triton.language import core

from tcomm.interpret import is_interpreted
from tcomm.kernels import heap

__all__ = [
    "BINDINGS",
    "CMP_EQ",
    "CMP_GE",
    "SIGNAL_ADD",
    "SIGNAL_SET",
    "Binding",
    "barrier",
    "fence",
    "get",
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

SIGNAL_SET = tl.constexpr(9)
SIGNAL_ADD = tl.constexpr(10)
CMP_EQ = tl.constexpr(0)
CMP_GE = tl.constexpr(5)


@dataclasses.dataclass(frozen=True)
class Binding:
    """A function of NVSHMEM as a kernel calls it."""

    name: str
    """In this file."""
    symbol: str
    """In the bitcode."""
    arguments: tuple[str, ...]
    """`address` (void* or uint64_t*), `size` (size_t), `word` (uint64_t) or `int`, in C's order."""
    result: str = "none"
    """Likewise; `none` for void."""
    every_thread: bool = True
    """Whether all threads of a program call it; otherwise one does, for all."""


_PUT = ("address", "address", "size", "int")
_PUT_SIGNAL = ("address", "address", "size", "address", "word", "int", "int")

BINDINGS = (
    Binding("put", "nvshmemx_putmem_block", _PUT),
    Binding("put_nbi", "nvshmemx_putmem_nbi_block", _PUT),
    Binding("get", "nvshmemx_getmem_block", _PUT),
    Binding("put_signal", "nvshmemx_putmem_signal_block", _PUT_SIGNAL),
    Binding("put_signal_nbi", "nvshmemx_putmem_signal_nbi_block", _PUT_SIGNAL),
    Binding("signal_op", "nvshmemx_signal_op", ("address", "word", "int", "int"), every_thread=False),
    Binding(
        "signal_wait_until",
        "nvshmem_signal_wait_until",
        ("address", "int", "word"),
        "word",
        every_thread=False,
    ),
    Binding("fence", "nvshmem_fence", (), every_thread=False),
    Binding("quiet", "nvshmem_quiet", (), every_thread=False),
    Binding("barrier", "nvshmemx_barrier_all_block", ()),
    Binding("my_pe", "nvshmem_my_pe", (), "int"),
    Binding("n_pes", "nvshmem_n_pes", (), "int"),
    Binding("ptr", "nvshmem_ptr", ("address", "int"), "address"),
)

_TYPES = {"address": tl.int64, "size": tl.int64, "word": tl.int64, "int": tl.int32, "none": tl.int32}


def _extern(binding: Binding):
    """The function of the bitcode as every thread calls it."""
    types = tuple(_TYPES[name] for name in binding.arguments)
    symbols = {types: (binding.symbol, _TYPES[binding.result])}

    def call(*values, _semantic=None):
        if len(values) != len(types):
            raise TypeError(f"{binding.name} takes {len(types)} arguments, not {len(values)}")
        tensors = [_semantic.to_tensor(value) for value in values]
        exact = [
            core.cast(value, kind, _semantic=_semantic) for value, kind in zip(tensors, types, strict=True)
        ]
        return core.extern_elementwise("", "", exact, symbols, is_pure=False, _semantic=_semantic)

    call.__name__ = binding.name
    return core.extern(call)


_externs = {binding.name: _extern(binding) for binding in BINDINGS}
_signal_op, _signal_wait_until = _externs["signal_op"], _externs["signal_wait_until"]
_fence, _quiet = _externs["fence"], _externs["quiet"]


@triton.jit
def _thread():
    """Number of the calling thread within its program."""
    return tl.inline_asm_elementwise("mov.u32 $0, %tid.x;", "=r", [], tl.int32, is_pure=False, pack=1)


@triton.jit
def _signal_op_once(signal, value, operation, pe):
    """Set, or add to, the word at the symmetric address `signal` of `pe`."""
    tl.debug_barrier()
    if _thread() == 0:
        _signal_op(signal, value, operation, pe)
    tl.debug_barrier()


@triton.jit
def _signal_wait_until_once(signal, comparison, value):
    """Wait until the word at `signal` of this PE compares so; returns what it holds."""
    tl.debug_barrier()
    if _thread() == 0:
        _signal_wait_until(signal, comparison, value)
    tl.debug_barrier()
    return tl.load(signal.to(tl.pointer_type(tl.int64)), volatile=True)


@triton.jit
def _fence_once():
    """What this program put before reaches each PE before what it puts after."""
    tl.debug_barrier()
    if _thread() == 0:
        _fence()
    tl.debug_barrier()


@triton.jit
def _quiet_once():
    """What this program put has arrived, and its sources may be written again."""
    tl.debug_barrier()
    if _thread() == 0:
        _quiet()
    tl.debug_barrier()


_once = {
    "signal_op": _signal_op_once,
    "signal_wait_until": _signal_wait_until_once,
    "fence": _fence_once,
    "quiet": _quiet_once,
}


def _callable(name: str):
    return getattr(heap, name) if is_interpreted() else _once.get(name, _externs[name])


put, put_nbi, get = _callable("put"), _callable("put_nbi"), _callable("get")
put_signal, put_signal_nbi = _callable("put_signal"), _callable("put_signal_nbi")
signal_op, signal_wait_until = _callable("signal_op"), _callable("signal_wait_until")
fence, quiet, barrier = _callable("fence"), _callable("quiet"), _callable("barrier")
my_pe, n_pes, ptr = _callable("my_pe"), _callable("n_pes"), _callable("ptr")
