"""A group's symmetric memory: control pages and mailboxes for its life, staging that can be replaced."""

from __future__ import annotations

import contextlib
import os
import secrets
import weakref
from collections.abc import Iterator, Sequence

import msgspec
import torch

from tcomm.errors import PeerLostError, RendezvousError
from tcomm.memory.base import Exchange, LaunchPart, NotShared, Staging, SymmetricBuffer
from tcomm.memory.channel import Channel
from tcomm.memory.control import (
    CONTROL_BYTES,
    EPOCH_MASK,
    MAX_BLOCKS,
    MAX_WORLD_SIZE,
    ControlPage,
    PoisonCode,
    Word,
)
from tcomm.memory.farewell import announce_leaving, cancel_leaving
from tcomm.memory.layout import StagingLayout
from tcomm.memory.liveness import Identity, PeerProcess, my_identity
from tcomm.memory.mailbox import Mailboxes, MailboxLayout
from tcomm.memory.regions import Regions
from tcomm.memory.runtime import HostRuntime
from tcomm.memory.shm import SharedMemoryTransport
from tcomm.signature import CallDescription

__all__ = ["Arena", "Staging", "open_arena"]


class Arena:
    """Control pages, mailboxes and staging of one group.

    Made by `open_arena`. Addresses never change: `grow` makes new staging and leaves the old one to those
    who hold it; control pages, mailboxes, epochs and arrival words stay.
    """

    is_virtual = False
    max_blocks = MAX_BLOCKS
    device = torch.device("cpu")
    runtime = HostRuntime()

    def __init__(
        self,
        exchange: Exchange,
        transport: SharedMemoryTransport,
        control: SymmetricBuffer,
        channel: Channel,
        lock_fd: int,
        spins: int,
    ) -> None:
        self.exchange = exchange
        self.control = control
        self.channel = channel
        self._mailboxes: Mailboxes | None = None
        self._spins = spins
        self.staging: Staging | None = None
        self.regions = Regions()
        self.launch_parts = (LaunchPart(channel.rank),)
        self._transport = transport
        # Who drops a group instead of closing it gives its descriptors back, too.
        self._release = weakref.finalize(
            channel, _release, channel.pages[channel.rank], channel.processes, lock_fd
        )
        self._release.atexit = False

    @property
    def rank(self) -> int:
        """This process, within the group."""
        return self.channel.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.channel.world_size

    @property
    def mailboxes(self) -> Mailboxes:
        """Of send and recv."""
        if self._mailboxes is None:
            raise AssertionError("the arena was not opened to its end")
        return self._mailboxes

    def make_mailboxes(self, timeout: float) -> str:
        """Make the memory of send and recv; why the ranks cannot share it, if so. **Collective.**

        Raises:
            CapabilityError: on every rank, when one lacks the room.
            PeerLostError: when a peer died meanwhile.
        """
        self.channel.name_call(CallDescription("set-up"))
        nbytes = MailboxLayout(self.world_size).nbytes
        made = self._transport.allocate(nbytes, timeout, self._refuse_the_gone)
        if isinstance(made, NotShared):
            return made.reason
        self._mailboxes = Mailboxes(self.channel, made, self._spins)
        return ""

    def grow(self, nbytes: int, timeout: float) -> Staging:
        """Replace the staging by one of `nbytes` a rank. **Collective**, with nothing in flight.

        Raises:
            CapabilityError: on every rank, when one lacks the room. The old staging stays.
            PeerLostError: when a peer died meanwhile.
        """
        with self._ending_with_the_lost():
            return self._grow(nbytes, timeout)

    @contextlib.contextmanager
    def _ending_with_the_lost(self) -> Iterator[None]:
        try:
            yield
        except PeerLostError as lost:
            self.channel.give_up(PoisonCode.PEER_LOST, lost.peers[0], lost.seq)
            raise

    def _grow(self, nbytes: int, timeout: float) -> Staging:
        channel = self.channel
        layout = StagingLayout(nbytes, self.world_size)
        made = self._allocate(nbytes, timeout, "staging")
        words = made.local.numpy().data[: layout.half_offset].cast("Q")
        lanes = layout.lane_half_bytes // 8
        channel.lanes = (words[:lanes], words[lanes:])
        for parity in (0, 1):
            channel.renew_lanes(parity, channel.words[Word.EPOCH])
        self.exchange.all_gather(b"", timeout, self._refuse_the_gone)
        self.staging = Staging(made, layout)
        return self.staging

    def add_region(self, nbytes: int, timeout: float) -> SymmetricBuffer:
        """Memory of `nbytes` a rank for tensors of callers, zeroed. **Collective.**

        Raises:
            CapabilityError: on every rank, when one lacks the room.
            PeerLostError: when a peer died meanwhile.
        """
        with self._ending_with_the_lost():
            made = self._allocate(nbytes, timeout, "a symmetric tensor")
        # By its epoch: a rank that failed meanwhile and goes on would count otherwise.
        self.regions.add(made, self.channel.words[Word.EPOCH])
        return made

    def _allocate(self, nbytes: int, timeout: float, what: str) -> SymmetricBuffer:
        made = self._transport.allocate(nbytes, timeout, self._refuse_the_gone)
        if isinstance(made, NotShared):
            raise RendezvousError(f"{what} of group {self.channel.group!r}: {made.reason}")
        return made

    def _refuse_the_gone(self) -> None:
        if gone := self.channel.find_gone():
            raise self.channel.lost(gone, self.channel.words[Word.EPOCH])

    def set_epoch(self, epoch: int) -> None:
        """Go on from `epoch`, with nothing in flight; the same on every rank. For tests of the wrap."""
        self.channel.words[Word.EPOCH] = epoch & EPOCH_MASK
        for parity in (0, 1):
            self.channel.pages[self.rank].renew(parity, epoch)
            self.channel.renew_lanes(parity, epoch)

    def close(self, reason: str) -> None:
        """Tell the peers that this rank leaves, and give everything back. May be called twice."""
        self.channel.pages[self.rank].leave(reason)
        self._release()
        self.staging = None
        self.regions.clear()


def _release(page: ControlPage, processes: Sequence[PeerProcess | None], lock_fd: int) -> None:
    # A forked child drops what it inherits, and its parent has not left.
    if page.words[Word.PID] == os.getpid():
        page.leave("its communicator was dropped without close()")
    cancel_leaving(page)
    for process in processes:
        if process is not None:
            process.close()
    os.close(lock_fd)


class _Hello(msgspec.Struct, frozen=True):
    identity: Identity
    nonce: int


def open_arena(
    group: str, exchange: Exchange, directory: str, spins: int, timeout: float
) -> Arena | NotShared:
    """Make a group's control pages and mailboxes. **Collective.**

    Args:
        group: name, for errors.
        exchange: reaches the other ranks.
        directory: memory file system that the ranks share.
        spins: polls before a wait yields.
        timeout: seconds for each step.

    Raises:
        CapabilityError: on every rank, when one lacks the room.
        RendezvousError: when a rank did not come in time.
        PeerLostError: when a rank that had come died.
    """
    rank, world_size = exchange.rank, exchange.world_size
    if world_size > MAX_WORLD_SIZE:
        return NotShared(f"{world_size} ranks; a control page has room for {MAX_WORLD_SIZE}")
    transport = SharedMemoryTransport(exchange, directory)
    made = transport.allocate_locked(CONTROL_BYTES, timeout)
    if isinstance(made, NotShared):
        return made
    control, fds = made
    pages = [ControlPage(control.peer(r)) for r in range(world_size)]
    me = my_identity()
    nonce = secrets.randbits(63)
    pages[rank].initialise(rank, world_size, nonce, me.pid, me.start_time)
    payload = msgspec.msgpack.encode(_Hello(me, nonce))
    processes, verdicts = _introduce(exchange, payload, pages, fds, timeout)
    channel = Channel(group, rank, pages, processes, spins)
    arena = Arena(exchange, transport, control, channel, fds[rank], spins)
    refusals = [f"rank {r} reads other memory of {v.decode()}" for r, v in enumerate(verdicts) if v]
    refusal = "the ranks share no memory (" + "; ".join(refusals) + ")" if refusals else ""
    try:
        refusal = refusal or arena.make_mailboxes(timeout)
    except BaseException as error:
        arena.close(f"{type(error).__name__}: {error}")
        raise
    if refusal:
        arena.close("the ranks share no memory")
        return NotShared(refusal)
    announce_leaving(pages[rank])
    return arena


def _introduce(
    exchange: Exchange, hello: bytes, pages: Sequence[ControlPage], fds: Sequence[int], timeout: float
) -> tuple[list[PeerProcess | None], list[bytes]]:
    """Watch the peers, and say whose page is not theirs; closes `fds` when somebody does not come."""
    rank, world_size = exchange.rank, exchange.world_size
    processes: list[PeerProcess | None] = []
    try:
        hellos = [msgspec.msgpack.decode(p, type=_Hello) for p in exchange.all_gather(hello, timeout)]
        wrong = [r for r in range(world_size) if not pages[r].matches(r, hellos[r].nonce)]
        processes.extend(
            None if r == rank else PeerProcess(hellos[r].identity, fds[r]) for r in range(world_size)
        )
        return processes, exchange.all_gather(str(wrong or "").encode(), timeout)
    except BaseException:
        for process in processes:
            if process is not None:
                process.close()
        for r in {rank, *range(len(processes), world_size)}:
            os.close(fds[r])
        raise
