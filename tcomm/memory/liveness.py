"""Whether a peer's process still lives, without asking it.

A pidfd where both processes see the same process ids; elsewhere a lock that the peer's kernel drops
with the peer. The lock belongs to an open file description (F_OFD_SETLK): an ordinary record lock would
vanish as soon as its process closes any other descriptor of the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import select
import signal
import struct
import threading

import msgspec

__all__ = ["Identity", "PeerProcess", "hold_lock", "is_locked", "my_identity"]

# struct flock: type, whence, start, length, pid (which must be 0 for these commands)
_FLOCK = "hhqqi4x"


class Identity(msgspec.Struct, frozen=True):
    """Enough to know a process again, and to know whether its pid means anything here."""

    pid: int
    start_time: int
    """In clock ticks since boot; tells a process from a later one with the same pid."""
    namespace: str
    """Boot id and pid namespace: pids can be compared where these are equal."""


def _stat_fields(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on (field 3 is at index 0); empty when there is none."""
    with contextlib.suppress(OSError):
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
        return text.rpartition(")")[2].split()
    return []


def _start_time(pid: int) -> int:
    fields = _stat_fields(pid)
    return int(fields[19]) if len(fields) > 19 else 0


def my_identity() -> Identity:
    """This process."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
    boot_id = boot.read_text().strip() if boot.exists() else "unknown"
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return Identity(os.getpid(), _start_time(os.getpid()), f"{boot_id}/{namespace}")


def hold_lock(fd: int, byte: int = 0) -> None:
    """Hold a byte of a file until this open file description is closed.

    Raises:
        BlockingIOError: when another description holds it.
    """
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))


def is_locked(fd: int) -> bool:
    """Whether somebody else's open file description holds the first byte."""
    request = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request)
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)


class PeerProcess:
    """A peer's process, watched from here.

    Args:
        identity: of the peer.
        lock_fd: descriptor of a file of which the peer holds the lock; owned by this object.
    """

    def __init__(self, identity: Identity, lock_fd: int) -> None:
        self.identity = identity
        self._lock_fd = lock_fd
        self._pidfd = -1
        self._poll = select.poll()
        self._looking = threading.Lock()
        self._was_gone = False
        if identity.namespace == my_identity().namespace and hasattr(os, "pidfd_open"):
            self._open_pidfd()

    def _open_pidfd(self) -> None:
        try:
            self._pidfd = os.pidfd_open(self.identity.pid)
        except ProcessLookupError:
            self._was_gone = True
            return
        except OSError:
            return  # an old kernel or a sandbox: the lock serves
        os.close(self._lock_fd)
        self._lock_fd = -1
        self._poll.register(self._pidfd, select.POLLIN)
        self._was_gone = _start_time(self.identity.pid) != self.identity.start_time

    def is_dead(self) -> bool:
        """Whether the process has ended. Costs about a microsecond."""
        if self._was_gone:
            return True
        if self._pidfd >= 0:
            # A poll object refuses a second thread; the watcher of a GPU's waits is one.
            with self._looking:
                return bool(self._poll.poll(0))
        return self._lock_fd >= 0 and not is_locked(self._lock_fd)

    def describe(self) -> str:
        """What is known of the process, for an error message."""
        pid = self.identity.pid
        if self._pidfd < 0:
            return f"pid {pid} in another pid namespace"
        fields = _stat_fields(pid)
        if self.is_dead():
            return f"pid {pid}, {_exit_status(fields)}"
        state = {"T": "stopped by a signal", "t": "stopped by a debugger", "D": "in uninterruptible sleep"}
        return f"pid {pid}, {state.get(fields[0] if fields else '', 'running')}"

    def close(self) -> None:
        """Give the descriptors back. May be called twice."""
        for fd in (self._pidfd, self._lock_fd):
            if fd >= 0:
                os.close(fd)
        self._pidfd = self._lock_fd = -1


def _exit_status(fields: list[str]) -> str:
    """How a process ended, as far as /proc tells of one that nobody has waited for yet."""
    if len(fields) < 50 or fields[0] != "Z":
        return "gone"
    status = int(fields[49])
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exited with code {os.waitstatus_to_exitcode(status)}"
