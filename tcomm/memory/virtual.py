"""Virtual ranks: W ranks in one process on one device, each with its own page and staging.

The kernels are those of real ranks, and so are their waits: a table of addresses does not tell who is behind
them. On a GPU one cooperative launch has the rank as its second axis, so that all ranks are on the device at
once or none; in streams, each rank is a launch of its own. On a CPU the interpreter lets ranks take turns.
"""

from __future__ import annotations

import collections
import weakref
from collections.abc import Sequence
from typing import Literal

import torch

from tcomm.errors import CapabilityError, CommError, ConfigError, PeerTimeoutError
from tcomm.memory.base import LaunchPart, Staging, SymmetricBuffer
from tcomm.memory.control import (
    ARRIVALS,
    CONTROL_BYTES,
    EPOCH_MASK,
    HOST_WORDS,
    LAYOUT_VERSION,
    MAGIC,
    MAILBOXES,
    MAX_BLOCKS,
    MAX_WORLD_SIZE,
    ErrorKind,
    HostWord,
    Word,
    dead_word,
)
from tcomm.memory.layout import StagingLayout
from tcomm.memory.runtime import CudaRuntime, HostRuntime, Runtime, StreamOrder
from tcomm.signature import CallDescription

__all__ = ["Mode", "VirtualArena"]

Mode = Literal["grid", "streams"]


class VirtualArena:
    """The memory of virtual ranks, as kernels see it. All of it is this process's own.

    Args:
        world_size: 1 to 16.
        device: a CPU, where kernels are interpreted, or a CUDA device.
        staging_bytes: of each rank.
        mode: `grid`, one launch for all ranks, or `streams`, one for each.
    """

    is_virtual = True
    rank = 0

    def __init__(
        self, world_size: int, device: torch.device, staging_bytes: int, mode: Mode = "grid"
    ) -> None:
        if type(world_size) is not int or not 1 <= world_size <= MAX_WORLD_SIZE:
            raise ConfigError(f"world_size={world_size!r}: virtual ranks are 1 to {MAX_WORLD_SIZE}")
        if mode not in {"grid", "streams"}:
            raise ConfigError(f"mode={mode!r} is neither 'grid' nor 'streams'")
        self.world_size = world_size
        self.device = device
        on_host = device.type == "cpu"
        self.max_blocks = MAX_BLOCKS if on_host else _blocks_at_once(device) // world_size
        self.runtime: Runtime = HostRuntime() if on_host else CudaRuntime(device)
        self.pages = torch.zeros(world_size, CONTROL_BYTES // 8, dtype=torch.int64, device=device)
        self.records = torch.zeros(
            world_size, HOST_WORDS, dtype=torch.int64, device="cpu", pin_memory=not on_host
        )
        self.control = SymmetricBuffer(0, list(self.pages.view(torch.uint8)))
        self.staging: Staging | None = None
        self._initialise()
        self.grow(staging_bytes)
        self.launch_parts: Sequence[LaunchPart] = (LaunchPart(0, world_size),)
        if mode == "streams":
            streams = [None if on_host else torch.cuda.Stream(device) for _ in range(world_size)]
            self.launch_parts = tuple(LaunchPart(rank, 1, stream) for rank, stream in enumerate(streams))
        self.channel = VirtualChannel(self)
        # A kernel in flight may still look at its record, which torch would give to somebody else.
        weakref.finalize(self, _settle, self.runtime, self.records).atexit = False

    def _initialise(self) -> None:
        header = torch.zeros(self.world_size, CONTROL_BYTES // 8, dtype=torch.int64, device="cpu")
        ranks = torch.arange(self.world_size, device="cpu")
        header[:, Word.LAYOUT_VERSION] = LAYOUT_VERSION
        header[:, Word.WORLD_SIZE] = self.world_size
        header[:, Word.RANK] = ranks
        header[:, Word.HOST_RECORD] = self.records.data_ptr() + ranks * HOST_WORDS * 8
        header[:, Word.MAGIC] = MAGIC
        self.pages.copy_(header)

    def grow(self, nbytes: int) -> Staging:
        """Replace the staging by one of `nbytes` a rank; whoever holds the old one keeps it.

        Raises:
            ConfigError: when that is too little.
            CapabilityError: while a graph is captured.
        """
        self.runtime.refuse_in_capture("staging has to be made")
        layout = StagingLayout(nbytes, self.world_size)
        # Calls on any stream may be using what there is.
        self.runtime.synchronise()
        memory = torch.zeros(self.world_size, nbytes // 8, dtype=torch.int64, device=self.device)
        self._renew_lanes(memory, layout, int(self.pages[0, Word.EPOCH]))
        self.staging = Staging(SymmetricBuffer(0, list(memory.view(torch.uint8))), layout)
        self.runtime.synchronise()
        return self.staging

    def _renew_lanes(self, memory: torch.Tensor, layout: StagingLayout, epoch: int) -> None:
        memory[:, : layout.half_offset // 8] = _signed(dead_word(epoch))

    def set_epoch(self, epoch: int) -> None:
        """Go on from `epoch`, with nothing in flight. For tests of the wrap."""
        staging = self.staging
        if staging is None:
            raise CapabilityError("virtual ranks without staging")
        self.runtime.synchronise()
        self.pages[:, ARRIVALS:MAILBOXES] = _signed(dead_word(epoch))
        self.pages[:, Word.EPOCH] = epoch & EPOCH_MASK
        for rank in range(self.world_size):
            memory = staging.buffer.peer(rank, dtype=torch.int64)
            self._renew_lanes(memory[None], staging.layout, epoch)
        self.runtime.synchronise()


def _blocks_at_once(device: torch.device) -> int:
    """Programs of 256 threads and 128 registers each that fit a device."""
    return 2 * int(torch.cuda.get_device_properties(device).multi_processor_count)


def _settle(runtime: Runtime, records: torch.Tensor) -> None:
    """Wait for the device before `records` are let go."""
    if not runtime.capture_id(runtime.current_stream()):
        runtime.synchronise()
    del records


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


class VirtualChannel:
    """The host's side of virtual ranks: order of streams, and errors that kernels put down.

    Args:
        arena: whose records it reads.
    """

    axis_rank = 0

    def __init__(self, arena: VirtualArena) -> None:
        self._arena = arena
        self._order = StreamOrder(arena.runtime, "virtual")
        self._calls = 0
        self._recent: collections.deque[tuple[CallDescription, float | None]] = collections.deque(maxlen=256)
        self._failure: CommError | None = None
        self._errors = arena.records[:, HostWord.ERROR].numpy()
        self._expected = arena.records[:, HostWord.EXPECTED].numpy()
        self._aborts = arena.records[:, HostWord.ABORT].numpy()

    def begin(self, call: CallDescription, timeout: float | None) -> int:
        """Count the call; order it after those before it.

        Raises:
            PeerTimeoutError: when an earlier call failed.
        """
        self.raise_recorded()
        self._calls += 1
        self._recent.append((call, timeout))
        self._order.enter()
        runtime = self._arena.runtime
        for part in self._arena.launch_parts:
            if part.stream is not None:
                runtime.let_wait(part.stream.cuda_stream, runtime.current_stream())
        return self._calls

    def after_kernel(self, epoch: int, everyone: bool = False) -> None:  # noqa: ARG002
        """Raise what the interpreter found. A GPU is not waited for: see `raise_recorded`.

        Raises:
            PeerTimeoutError: when a virtual rank waited in vain.
        """
        del epoch
        runtime = self._arena.runtime
        for part in self._arena.launch_parts:
            if part.stream is not None:
                runtime.let_wait(runtime.current_stream(), part.stream.cuda_stream)
        if self._arena.device.type == "cpu":
            self.raise_recorded()

    def kernel_pause(self, phase: int, block: int, word: int) -> int:
        """Whether the wait is to end: 1 after `abort`. The turns themselves are not taken here."""
        del phase, block, word
        return int(self._aborts.any())

    def raise_recorded(self) -> None:
        """Raise what kernels have put down so far. Reads host memory only, and waits for nothing.

        Raises:
            PeerTimeoutError: when a virtual rank waited in vain; the ranks are of no use any more.
        """
        if self._failure is None and self._errors.any():
            rank = int(self._errors.nonzero()[0][0])
            error = int(self._errors[rank])
            kind, peer = error & 0xFF, error >> 8 & 0xFF
            op, timeout = self._call_of(int(self._expected[rank]) & 0xFFFFFFFF)
            found = "called something else" if kind == ErrorKind.MISMATCH else "did not come in time"
            limit = "no deadline" if timeout is None else f"{timeout:g} s"
            streams = any(part.stream is not None for part in self._arena.launch_parts)
            hint = " (or more queues than ranks: CUDA_DEVICE_MAX_CONNECTIONS=32)" if streams else ""
            self._failure = PeerTimeoutError(
                f"{op}: virtual rank {rank} waited for rank {peer}, which {found} ({limit}); "
                f"make new virtual ranks{hint}",
                group="virtual", op=op, seq=self._calls, rank=rank, peers=[peer],
            )  # fmt: skip
        if self._failure is not None:
            raise self._failure

    def _call_of(self, signature: int) -> tuple[str, float | None]:
        """Verb and timeout of the last call with that signature; of the last one where none is known."""
        for call, timeout in reversed(self._recent):
            if call.signature == signature:
                return call.op, timeout
        return (self._recent[-1][0].op, self._recent[-1][1]) if self._recent else ("", None)

    def abort(self) -> None:
        """Make every kernel that waits give up."""
        self._arena.records[:, HostWord.ABORT] = 1
