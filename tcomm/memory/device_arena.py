"""The memory of a group on its GPUs: a page for each rank for its life, and staging that can be replaced.

The page is that of `docs/memory-model.md`, in device memory: kernels own it, and the host reads it only when
nothing is in flight. What the host and a kernel have to tell one another is in pinned host memory.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable
from typing import Protocol

import torch

from tcomm.errors import CapabilityError, GroupClosedError, PeerLostError, TcommError
from tcomm.memory.base import Exchange, LaunchPart, NotShared, Staging, SymmetricBuffer
from tcomm.memory.channel import Channel
from tcomm.memory.control import (
    ARRIVALS,
    CONTROL_BYTES,
    EPOCH_MASK,
    LAYOUT_VERSION,
    MAGIC,
    MAILBOXES,
    MAX_BLOCKS,
    MAX_WORLD_SIZE,
    PoisonCode,
    Word,
    dead_word,
)
from tcomm.memory.cuda import DeviceBuffer
from tcomm.memory.device_channel import DeviceChannel
from tcomm.memory.layout import StagingLayout
from tcomm.memory.nvshmem import NvshmemTransport
from tcomm.memory.nvshmem_buffer import NvshmemBuffer
from tcomm.memory.runtime import CudaRuntime, HostRuntime, Runtime
from tcomm.signature import CallDescription

__all__ = ["DeviceArena", "open_device_arena"]

logger = logging.getLogger("tcomm")

_LAST_CALLS_SECONDS = 120.0
"""How long a closing group waits for what it launched without a deadline."""
_OTHERS_SECONDS = 5.0
"""How long it waits for the others, where memory is bound to an address that they use."""


ProveAccess = Callable[
    [Exchange, SymmetricBuffer, Callable[[], None], float, Callable[[], None]], dict[int, str]
]
"""`tcomm.memory.probe.prove_access`."""


class DeviceTransport(Protocol):
    """Makes symmetric buffers on GPUs: `CudaTransport` on one machine, `NvshmemTransport` on several."""

    def allocate(
        self, nbytes: int, timeout: float, check: Callable[[], None] | None = None
    ) -> DeviceBuffer | NvshmemBuffer | NotShared:
        """Make a zeroed buffer of `nbytes` on every rank's device. **Collective.**"""
        ...

    def keep(self, thing: object) -> None:
        """Keep what kernels may use until `release`."""
        ...

    def release(self) -> None:
        """Give everything back, with nothing in flight on the device. May be called twice."""
        ...

    def settle(self) -> None:
        """Wait until the device has done all that it was given."""
        ...

    def why_no_multicast(self) -> str:
        """Why its buffers have no multicast address; empty where they should have."""
        ...


class DeviceArena:
    """One rank's hold on a group's memory on GPUs. Made by `open_device_arena`.

    Addresses never change: `grow` makes new staging and leaves the old one to those who hold it.

    Attributes:
        rank: this process, within the group.
        world_size: number of ranks.
        device: of this rank.
        control: pages of all ranks.
        channel: what happens on the host around a launch.
        runtime: streams of the device.
        launch_parts: one launch, of this rank.
        unreachable: peers that cannot be reached, and why; proved by `tcomm.memory.probe` at the opening.
        nvshmem: what made the memory, where that is NVSHMEM.
    """

    is_virtual = False
    max_blocks = MAX_BLOCKS

    def __init__(
        self,
        group: str,
        exchange: Exchange,
        transport: DeviceTransport,
        arena: DeviceBuffer | NvshmemBuffer,
        device: torch.device,
        runtime: Runtime,
        host: Channel | None,
    ) -> None:
        self.rank = exchange.rank
        self.world_size = exchange.world_size
        self.device = device
        self.runtime = runtime
        self.control = arena.part(0, CONTROL_BYTES)
        self.multicast = arena.multicast
        self.unreachable: dict[int, str] = {}
        self.nvshmem = transport if isinstance(transport, NvshmemTransport) else None
        self.launch_parts = (LaunchPart(self.rank),)
        self._exchange = exchange
        self._transport = transport
        self._host = host
        self._page = self.control.local.view(torch.int64)
        self._staging: Staging | None = None
        self._is_closed = False
        settle = transport.settle
        self.channel = DeviceChannel(group, self.rank, self.world_size, self._page, runtime, settle, host)
        transport.keep(self.channel.record)

    @property
    def staging(self) -> Staging | None:
        """Where messages pass.

        Raises:
            GroupClosedError: when the arena was closed.
        """
        self._refuse_closed()
        return self._staging

    def initialise(self, staging: DeviceBuffer | NvshmemBuffer) -> None:
        """Fill in this rank's page and lanes, before any rank launches anything."""
        page = torch.zeros(CONTROL_BYTES // 8, dtype=torch.int64, device="cpu")
        page[ARRIVALS:MAILBOXES] = _signed(dead_word(0))
        page[Word.LAYOUT_VERSION] = LAYOUT_VERSION
        page[Word.RANK] = self.rank
        page[Word.WORLD_SIZE] = self.world_size
        page[Word.NONCE] = secrets.randbits(63)
        page[Word.HOST_RECORD] = self.channel.record.data_ptr()
        page[Word.MAGIC] = MAGIC
        self._page.copy_(page)
        self._adopt(staging, 0)

    def grow(self, nbytes: int, timeout: float) -> Staging:
        """Replace the staging by one of `nbytes` a rank. **Collective**, with nothing in flight.

        Args:
            nbytes: the same on every rank.
            timeout: seconds for each step.

        Raises:
            CapabilityError: while a graph is captured; on every rank, when one lacks the room, and the old
                staging stays.
            PeerLostError, PeerTimeoutError: when the group was given up, or a peer died meanwhile.
            CollectiveMismatchError: what an earlier call left behind; the new staging is there.
        """
        self._refuse_closed()
        self.runtime.refuse_in_capture("staging has to be made")
        layout = StagingLayout(nbytes, self.world_size)
        self._transport.settle()
        try:
            made = self._transport.allocate(layout.nbytes, timeout, self._refuse_the_gone)
            if isinstance(made, NotShared):
                raise CapabilityError(f"staging of {nbytes} bytes: {made.reason}; the old one stays")
            staging = self._lanes_of_nobody(made, int(self._page[Word.EPOCH]))
            self._exchange.all_gather(b"", timeout, self._refuse_the_gone)
        except PeerLostError as lost:
            if self._host is not None:
                self._host.give_up(PoisonCode.PEER_LOST, lost.peers[0], lost.seq)
            raise
        self._staging = staging
        # Not before: a rank that raised would leave the others waiting.
        self.channel.raise_recorded()
        return staging

    def prove_access(self, prove: ProveAccess, timeout: float) -> None:
        """Find out whom this rank really reaches. **Collective**, with nothing in flight.

        Raises:
            RendezvousError, PeerLostError: when a rank did not come.
        """
        settle, check = self._transport.settle, self._refuse_the_gone
        self.unreachable = prove(self._exchange, self.control, settle, timeout, check)

    def set_epoch(self, epoch: int) -> None:
        """Go on from `epoch`, with nothing in flight; the same on every rank. For tests of the wrap."""
        staging = self.staging
        self._transport.settle()
        self._page[ARRIVALS:MAILBOXES] = _signed(dead_word(epoch))
        self._page[Word.EPOCH] = epoch & EPOCH_MASK
        if staging is not None:
            words = staging.buffer.peer(self.rank, dtype=torch.int64)
            words[: staging.layout.half_offset // 8] = _signed(dead_word(epoch))
        self.channel.start_again()
        self._transport.settle()

    def leave_out(self, ranks: int) -> None:
        """Let kernels leave ranks out, from the next launch or replay on: see `DeviceChannel.leave_out`."""
        self.channel.leave_out(ranks)

    def epoch_of(self, rank: int) -> int:
        """Calls that kernels of a rank have completed, once this device has done what it was given."""
        self._transport.settle()
        return int(self.control.peer(rank, dtype=torch.int64)[Word.EPOCH])

    def close(self, reason: str = "it was closed") -> None:
        """Complete what was launched, and give the memory back. May be called twice.

        Not collective, unless there is multicast, where a rank's memory is bound to an address that others
        use, or NVSHMEM, which frees together: then it waits a little for the others. What is launched and
        cannot complete is aborted.
        """
        if self._is_closed:
            return
        self._is_closed = True
        abort = threading.Timer(_LAST_CALLS_SECONDS, self.channel.abort)
        abort.daemon = True
        abort.start()
        broken = False
        try:
            self._transport.settle()
        except RuntimeError as error:
            broken = True
            logger.warning("group %r: %s failed before its end: %s", self.channel.group, self.device, error)
        finally:
            abort.cancel()
            self.channel.close(reason)
        self._staging = None
        if not broken:
            if self.multicast:
                self._await_the_others()
            # Torch's destructors would end the process where the device answers no more.
            self._transport.release()

    def _await_the_others(self) -> None:
        try:
            self._exchange.all_gather(b"", _OTHERS_SECONDS, self._refuse_the_gone)
        except TcommError:
            return  # they are gone, or busy elsewhere, and have their own deadlines

    def _adopt(self, made: DeviceBuffer | NvshmemBuffer, epoch: int) -> None:
        self._staging = self._lanes_of_nobody(made, epoch)

    def _lanes_of_nobody(self, made: DeviceBuffer | NvshmemBuffer, epoch: int) -> Staging:
        layout = StagingLayout(made.nbytes, self.world_size)
        made.local.view(torch.int64)[: layout.half_offset // 8] = _signed(dead_word(epoch))
        self._transport.settle()
        return Staging(made, layout, made.multicast)

    def _refuse_closed(self) -> None:
        if self._is_closed:
            raise GroupClosedError(
                f"the memory of group {self.channel.group!r} on {self.device} was closed",
                group=self.channel.group,
                rank=self.rank,
            )

    def _refuse_the_gone(self) -> None:
        host = self._host
        if host is not None:
            host.name_call(CallDescription("set-up on GPUs"))
            if host.words[Word.POISON_CODE]:
                host.raise_poison()
            if gone := host.find_gone():
                raise host.lost(gone, self.channel.calls)


def open_device_arena(
    group: str,
    exchange: Exchange,
    transport: DeviceTransport,
    device: torch.device,
    host: Channel | None,
    staging_bytes: int,
    timeout: float,
    prove: Callable[[DeviceArena], None] | None = None,
) -> DeviceArena | NotShared:
    """Make a group's memory on its GPUs: one allocation a rank for page and staging. **Collective.**

    Args:
        group: name, for errors.
        exchange: reaches the other ranks.
        transport: makes the memory.
        device: of this rank, with an index.
        host: the group's channel on this machine, by which dead peers are noticed; None: deadlines on the
            devices are all there is.
        staging_bytes: of each rank, the same on all.
        timeout: seconds for each step.
        prove: called once the memory is there, before it is used; collective.

    Raises:
        CapabilityError: on every rank, when one lacks the room.
        RendezvousError: when a rank did not come in time.
        PeerLostError: when a rank that had come died.
    """
    if exchange.world_size > MAX_WORLD_SIZE:
        transport.release()
        return NotShared(f"{exchange.world_size} ranks; a control page has room for {MAX_WORLD_SIZE}")
    runtime: Runtime = HostRuntime() if device.type == "cpu" else CudaRuntime(device)
    runtime.refuse_in_capture("the memory of the group has to be made")
    layout = StagingLayout(staging_bytes, exchange.world_size)

    def refuse_the_gone() -> None:
        if host is not None and (gone := host.find_gone()):
            raise host.lost(gone, 0)

    try:
        made = transport.allocate(CONTROL_BYTES + layout.nbytes, timeout, refuse_the_gone)
    except CapabilityError:
        transport.release()
        raise
    if isinstance(made, NotShared):
        transport.release()
        return made
    arena = DeviceArena(group, exchange, transport, made, device, runtime, host)
    try:
        arena.initialise(made.part(CONTROL_BYTES, layout.nbytes))
        exchange.all_gather(b"", timeout, refuse_the_gone)
        if prove is not None:
            prove(arena)
    except BaseException as error:
        arena.close(f"{type(error).__name__}: {error}")
        raise
    return arena


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
