"""Compiled kernels, bound once: what stays the same from call to call is kept, tensors and streams change.

Triton's own launch looks every argument over, which takes longer than a small collective. Here that happens
once for each kind of call; afterwards a launch is one call into the driver, with addresses.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import triton

from tcomm.errors import CapabilityError
from tcomm.memory.base import KernelArena, Staging
from tcomm.signature import CallDescription

__all__ = [
    "COMPILED_MAX_REGISTERS",
    "COMPILED_THREADS",
    "BoundLaunch",
    "Link",
    "Rebound",
    "budget_of",
    "compile_and_load",
    "compiles_only",
    "compiling_only",
    "launch_compiled",
    "launches",
]

COMPILED_THREADS = 256
"""Threads of a compiled program: 8 warps of 32, 4 waves of 64."""
COMPILED_MAX_REGISTERS = 128
"""`maxnreg` of a compiled kernel: without it ptxas spills of its own accord, to fit more blocks on an SM."""

launches: collections.Counter[str] = collections.Counter()
"""How often each kernel was launched in this process, by name."""

_VECTOR_BYTES = 16
_POLLS_WITHOUT_A_CLOCK = 1 << 31
_FOR_EVER = 1 << 62
_ALWAYS_LONG = {"signature", "budget"}
"""Arguments that are 64 bits wide whatever their value."""
_compiled: dict[tuple[object, ...], Any] = {}
_in_graphs: dict[int, BoundLaunch] = {}
"""Launches that a graph was captured of: nobody says when a graph ends, so their memory is kept for good."""


class Link(Protocol):
    """A library that is linked into a kernel, and has a say once that is loaded."""

    key: str
    """What kernels with it are told apart by."""
    options: Mapping[str, Any]
    """Of the compiler, above those of every kernel."""

    def is_ready(self, compiled: Any) -> bool:
        """Whether `get_ready` has nothing to do."""
        ...

    def get_ready(self, compiled: Any) -> None:
        """Do what comes between loading and the first launch."""
        ...


@dataclasses.dataclass(frozen=True)
class BoundLaunch:
    """A launch of which only the addresses of two tensors, the stream and the time are open."""

    name: str
    """Of the kernel."""
    compiled: Any
    """`triton.compiler.CompiledKernel`, loaded."""
    num_blocks: int
    """Programs of each rank."""
    arena: KernelArena
    """Of the group."""
    call: CallDescription
    """For the signature."""
    tensors: tuple[int, ...]
    """Addresses of x and out when it was bound; none for a barrier."""
    before: tuple[Any, ...]
    """Arguments behind x and out, up to the rank; tensors among them stay alive with this."""
    after: tuple[Any, ...]
    """Constants, in order."""
    staging: Staging | None
    """What it uses besides, which stays alive with this."""

    def __call__(self, tensors: Sequence[int], budget: int) -> None:
        """Launch on x and out at these addresses, in the streams of the arena."""
        if not self.arena.runtime.is_current():
            with self.arena.runtime.on_device():
                self(tensors, budget)
            return
        kernel, runtime = self.compiled, self.arena.runtime
        launches[self.name] += 1
        current = runtime.current_stream()
        if runtime.capture_id(current):
            _in_graphs[id(self)] = self
        for part in self.arena.launch_parts:
            stream = current if part.stream is None else part.stream.cuda_stream
            kernel.run(
                self.num_blocks, part.num_ranks, 1, stream, kernel.function, kernel.packed_metadata,
                None, None, None, *tensors, *self.before, part.rank, budget, *self.after,
            )  # fmt: skip


@contextlib.contextmanager
def compiling_only() -> Iterator[None]:
    """Launchers called inside compile and load their kernels, and launch nothing."""
    before, _recorder.compiles_only = _recorder.compiles_only, True
    try:
        yield
    finally:
        _recorder.compiles_only = before


def compiles_only() -> bool:
    """Whether this thread is inside `compiling_only`."""
    return _recorder.compiles_only


def launch_compiled(
    kernel: Any,
    num_blocks: int,
    arena: KernelArena,
    call: CallDescription,
    values: tuple[Any, ...],
    budget: int,
    constants: Mapping[str, Any],
    link: Link | None = None,
) -> None:
    """Launch a kernel, compiled when it was not before.

    Args:
        kernel: a `@triton.jit` function whose first arguments are x and out, or the tables.
        num_blocks: programs of each rank.
        arena: of the group.
        call: for the signature.
        values: of all run-time arguments up to the rank.
        budget: what each wait may take; see `launch.budget_of`.
        constants: of the kernel, by name.
        link: what is linked into it.

    Raises:
        CapabilityError: while a graph is captured, when it has yet to be compiled or loaded.
    """
    has_tensors = kernel.arg_names[0] == "x_ptr"
    compiled = compile_and_load(kernel, arena, values, constants, link)
    ordered = tuple(constants[name] for name in kernel.arg_names if name in constants)
    split = 2 if has_tensors else 0
    tensors = tuple(value.data_ptr() for value in values[:split])
    bound = BoundLaunch(
        kernel.__name__, compiled, num_blocks, arena, call, tensors, values[split:], ordered, arena.staging
    )
    bound(tensors, budget)
    if _recorder.lists:
        _recorder.lists[-1].append(bound)


def compile_and_load(
    kernel: Any,
    arena: KernelArena,
    arguments: tuple[Any, ...],
    constants: Mapping[str, Any],
    link: Link | None = None,
) -> Any:
    """The kernel for arguments of this kind, compiled and loaded on the device of the arena.

    Args:
        kernel: a `@triton.jit` function.
        arena: of the group.
        arguments: run-time arguments up to the rank.
        constants: of the kernel, by name.
        link: what is linked into it.

    Raises:
        CapabilityError: while a graph is captured, when it has yet to be compiled or loaded.
    """
    values = (*arguments, arena.launch_parts[0].rank, _FOR_EVER)
    named = zip(kernel.arg_names, values, strict=False)
    kinds = tuple(_kind(value) for name, value in named if name not in _ALWAYS_LONG)
    # Whether launches that are not one may overlap is said nowhere for cooperative ones.
    is_one = all(part.stream is None for part in arena.launch_parts)
    linked = "" if link is None else link.key
    key = (kernel, arena.device, is_one, linked, kinds, tuple(sorted(constants.items(), key=str)))
    found = _compiled.get(key)
    if found is None or (link is not None and not link.is_ready(found)):
        arena.runtime.refuse_in_capture(f"{kernel.__name__} has to be compiled and loaded")
        with arena.runtime.on_device():
            if found is None:
                found = _load(kernel, values, constants, is_one, {} if link is None else link.options)
            if link is not None:
                link.get_ready(found)
        _compiled[key] = found
    return found


def _load(
    kernel: Any,
    values: tuple[Any, ...],
    constants: Mapping[str, Any],
    is_one: bool,
    more: Mapping[str, Any],
) -> Any:
    options: dict[str, Any] = {"launch_cooperative_grid": is_one}
    target = triton.runtime.driver.active.get_current_target()
    options["num_warps"] = COMPILED_THREADS // target.warp_size
    if target.backend == "cuda":
        options["maxnreg"] = COMPILED_MAX_REGISTERS
    found = kernel.run(*values, grid=(1, 1, 1), warmup=True, **constants, **options | dict(more))
    # Loads the module: later that could wait for a kernel which waits for this rank.
    if found.run is None or found.function is None:
        raise CapabilityError(f"Triton gave no launcher for {kernel.__name__}")
    return found


def _kind(value: Any) -> object:
    """All of an argument that the compiler takes notice of."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % _VECTOR_BYTES == 0
    return abs(value) >> 31 == 0 if isinstance(value, int) else None


def budget_of(timeout: float | None) -> int:
    """What a compiled kernel may spend in one wait: nanoseconds, or polls where it has no clock."""
    if torch.version.hip is not None:
        return _POLLS_WITHOUT_A_CLOCK
    return _FOR_EVER if timeout is None or timeout * 1e9 > _FOR_EVER else int(timeout * 1e9)


class Rebound:
    """A call that goes through its launcher the first time, and from then on by what that launched.

    Args:
        run: makes the call, given x, out and the timeout; always with tensors of one shape and dtype.
    """

    def __init__(self, run: Callable[[torch.Tensor, torch.Tensor, float | None], object]) -> None:
        self._run = run
        self._bound: dict[tuple[int, int], tuple[int, int, list[BoundLaunch]]] = {}

    def __call__(self, x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
        """Make the call. **Collective.**

        Raises:
            CapabilityError: while a graph is captured, when something has yet to be compiled or made.
            CollectiveMismatchError, PeerLostError, PeerTimeoutError: what an earlier call left behind.
        """
        x_at, out_at = x.data_ptr(), out.data_ptr()
        # Kernels are compiled for tensors at a multiple of a vector, or for others.
        kind = (x_at % _VECTOR_BYTES, out_at % _VECTOR_BYTES)
        known = self._bound.get(kind)
        if known is None:
            with _recording() as recorded:
                self._run(x, out, timeout)
            if recorded:
                self._bound[kind] = (x_at, out_at, recorded)
            return
        moved = (x_at - known[0], out_at - known[1])
        budget = budget_of(timeout)
        for each in known[2]:
            channel = each.arena.channel
            epoch = channel.begin(each.call, timeout)
            each([address + by for address, by in zip(each.tensors, moved, strict=False)], budget)
            channel.after_kernel(epoch)


@contextlib.contextmanager
def _recording() -> Iterator[list[BoundLaunch]]:
    """Collect the compiled launches of one call."""
    _recorder.lists.append([])
    try:
        yield _recorder.lists[-1]
    finally:
        _recorder.lists.pop()


class _Recorder(threading.local):
    """What this thread does besides launching: lists being recorded, innermost last."""

    def __init__(self) -> None:
        self.lists: list[list[BoundLaunch]] = []
        self.compiles_only = False


_recorder = _Recorder()
