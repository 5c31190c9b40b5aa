"""Symmetric memory between the processes of one machine: POSIX shared memory.

Each rank makes one file in a memory file system under a random name, mode 0600, refusing a name that
exists; backs it with real pages, so that too little room is an error here and never a SIGBUS later; and
removes the name as soon as all ranks have mapped it. A name can outlive its maker only if that process is
killed in between; the next group to start removes such names, which it knows by their released lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import platform
import secrets
import time
from collections.abc import Callable
from typing import cast

import msgspec
import torch

from tcomm.errors import CapabilityError
from tcomm.memory.base import Exchange, NotShared, SymmetricBuffer
from tcomm.memory.liveness import hold_lock, is_locked

__all__ = ["VERDICT", "Offer", "Segment", "SharedMemoryTransport", "remove_orphans", "why_unordered"]

_PREFIX = "tcomm-"
_ORPHAN_SECONDS = 60.0
_OLD_VERDICT_SECONDS = 24 * 3600.0
VERDICT = "-verdict-"
"""In the names of links by which ranks decide; see `verdicts`."""


class Offer(msgspec.Struct, frozen=True):
    """What a rank tells the others of the file it made."""

    path: str = ""
    """Its name; empty where it has none to offer."""
    device: int = 0
    """Of the file system; with the inode it says which file is meant."""
    inode: int = 0
    """Of the file."""
    problem: str = ""
    """Why there is none; empty where there is one."""


class Segment:
    """A file in a memory file system, and the memory behind it.

    Args:
        path: its name.
        fd: it, opened; the segment's from now on.

    Attributes:
        path, fd: as given.
    """

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd

    @classmethod
    def create(cls, directory: str, nbytes: int) -> Segment:
        """Make a file of `nbytes` that is really backed. Raises OSError, leaving nothing behind."""
        path = f"{directory}/{_PREFIX}{os.getuid()}-{secrets.token_hex(12)}"
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        segment = cls(path, fd)
        try:
            hold_lock(fd)
            room = os.statvfs(directory)
            if room.f_bavail * room.f_frsize < nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.posix_fallocate(fd, 0, nbytes)
        except OSError:
            segment.unlink()
            segment.close()
            raise
        return segment

    @classmethod
    def open(cls, offer: Offer) -> Segment:
        """Open a peer's file. Raises OSError when it is not there, or is not the same file."""
        fd = os.open(offer.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != (offer.device, offer.inode):
            os.close(fd)
            raise OSError(errno.ESTALE, "a different file of that name", offer.path)
        return cls(offer.path, fd)

    def offer(self) -> Offer:
        """What others need to open it."""
        status = os.fstat(self.fd)
        return Offer(self.path, status.st_dev, status.st_ino)

    def map(self, nbytes: int) -> torch.Tensor:
        """[nbytes] uint8 over the file. The mapping keeps no descriptor and ends with its last tensor."""
        path = f"/proc/self/fd/{self.fd}"
        storage = cast("torch.UntypedStorage", torch.UntypedStorage.from_file(path, True, nbytes))
        return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)

    def unlink(self) -> None:
        """Remove the name, if it is still there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def close(self) -> None:
        """Give the descriptor back, and with it the lock. Once."""
        os.close(self.fd)


class SharedMemoryTransport:
    """Symmetric buffers over POSIX shared memory.

    Args:
        exchange: reaches the other ranks.
        directory: of a memory file system that the ranks share.
    """

    name = "shared memory"

    def __init__(self, exchange: Exchange, directory: str = "/dev/shm") -> None:
        self._exchange = exchange
        self._directory = directory

    def allocate(
        self, nbytes: int, timeout: float, check: Callable[[], None] | None = None
    ) -> SymmetricBuffer | NotShared:
        """Make a zeroed buffer of `nbytes` on every rank and map all of them. **Collective.**

        Raises:
            CapabilityError: on every rank, when one of them lacks the room; says needed and available.
            RendezvousError: when a rank did not come in time.
        """
        made = self.allocate_locked(nbytes, timeout, check)
        if isinstance(made, NotShared):
            return made
        buffer, fds = made
        for fd in fds:
            os.close(fd)
        return buffer

    def allocate_locked(
        self, nbytes: int, timeout: float, check: Callable[[], None] | None = None
    ) -> tuple[SymmetricBuffer, list[int]] | NotShared:
        """As `allocate`, handing over the open files: each rank holds a lock on its own while it lives."""
        unordered = why_unordered()
        remove_orphans(self._directory)
        own, offer = (None, Offer()) if unordered else self._create(nbytes)
        opened: list[Segment] = []
        try:
            offers = self._gather(offer, timeout, check)
            self._refuse_lack_of_room(offers, nbytes)
            opened, problem = ([], unordered) if unordered else _open_all(offers, self._exchange.rank, own)
            buffers: list[torch.Tensor] = []
            try:
                buffers = [] if problem else [segment.map(nbytes) for segment in opened]
            except RuntimeError as error:
                problem = f"cannot map: {error}"
            verdicts = self._gather(Offer(problem=problem), timeout, check)
            refusals = [f"rank {r}: {v.problem}" for r, v in enumerate(verdicts) if v.problem]
            if refusals:
                return NotShared("the ranks share no memory (" + "; ".join(refusals) + ")")
            fds = [segment.fd for segment in opened]
            own, opened = None, []
            return SymmetricBuffer(self._exchange.rank, buffers), fds
        finally:
            # Nobody needs the name any more: all have opened the file, or nobody ever will.
            with contextlib.suppress(FileNotFoundError):
                if offer.path:
                    os.unlink(offer.path)
            for fd in {s.fd for s in [*opened, own] if s is not None}:
                os.close(fd)

    def _create(self, nbytes: int) -> tuple[Segment | None, Offer]:
        """This rank's file, or an offer that tells the others why there is none."""
        try:
            segment = Segment.create(self._directory, nbytes)
        except OSError as error:
            available = "unknown"
            with contextlib.suppress(OSError):
                room = os.statvfs(self._directory)
                available = str(room.f_bavail * room.f_frsize)
            return None, Offer(
                problem=f"{error.strerror}: needed {nbytes} bytes in {self._directory}, available {available}"
            )
        return segment, segment.offer()

    def _refuse_lack_of_room(self, offers: list[Offer], nbytes: int) -> None:
        lacking = [f"rank {rank}: {offer.problem}" for rank, offer in enumerate(offers) if offer.problem]
        if lacking:
            raise CapabilityError(
                f"no shared memory of {nbytes} bytes a rank ({'; '.join(lacking)}); make the file system "
                "larger (docker run --shm-size, or mount -o remount,size=...), name another in "
                "TCOMM_SHM_DIR, or lower TCOMM_STAGING_BYTES"
            )

    def _gather(self, offer: Offer, timeout: float, check: Callable[[], None] | None) -> list[Offer]:
        payloads = self._exchange.all_gather(msgspec.msgpack.encode(offer), timeout, check)
        return [msgspec.msgpack.decode(payload, type=Offer) for payload in payloads]


def why_unordered() -> str:
    """Why plain aligned 8-byte stores do not publish on this machine; empty where they do."""
    if platform.machine().lower() in {"x86_64", "amd64"}:
        return ""
    return f"plain 8-byte stores do not publish on {platform.machine()}; only x86-64 orders them"


def _open_all(offers: list[Offer], rank: int, own: Segment | None) -> tuple[list[Segment], str]:
    """Open every rank's file; the second value says what could not be opened, and why."""
    opened: list[Segment] = []
    for peer, offer in enumerate(offers):
        if peer == rank and own is not None:
            opened.append(own)
            continue
        try:
            opened.append(Segment.open(offer))
        except OSError as error:
            return opened, f"cannot open the memory of rank {peer}: {error.strerror}"
    return opened, ""


def remove_orphans(directory: str) -> None:
    """Remove names whose makers were killed before they could: old, ours, and with nobody's lock.

    Links have no lock: those of verdicts go when they are so old that nobody can still ask for them.
    """
    mine = f"{_PREFIX}{os.getuid()}-*"
    # The kernel's clock, by which files have their times: a process may be told another one, and would
    # take a file for old that its maker has yet to lock.
    now = time.clock_gettime(time.CLOCK_REALTIME)
    for path in pathlib.Path(directory).glob(mine):
        with contextlib.suppress(OSError):
            seconds = now - path.lstat().st_mtime
            if path.is_symlink():
                if VERDICT in path.name and seconds > _OLD_VERDICT_SECONDS:
                    path.unlink()
                continue
            if seconds < _ORPHAN_SECONDS:
                continue
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if not is_locked(fd):
                    path.unlink()
            finally:
                os.close(fd)
