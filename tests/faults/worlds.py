"""Ranks for fault tests: kinds of group, errors as data, and signals between ranks and the test."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import signal
import threading
import time

import torch

import tcomm
from tcomm.errors import CommError
from tcomm.memory import shm
from tcomm.memory.control import Word
from tests.faults.leaks import given_back
from tests.ranks import Member

KINDS = {"cpu": "cpu", "triton": "triton", "torch": "torch", "remote": ""}
"""Kinds of group, and the algorithm that their all-reduces are forced to."""
NEED_PROCESS_GROUP = ("torch", "remote")


@dataclasses.dataclass(frozen=True)
class Failure:
    """An error as a rank reports it."""

    kind: str
    text: str
    seconds: float
    """From the call to the error."""
    at: float
    """On the clock that all processes of a machine share."""
    op: str = ""
    seq: int = -1
    rank: int = -1
    peers: tuple[int, ...] = ()


def failure_of(call, *args, **kwargs) -> Failure:
    """The error that `call` raises; an AssertionError when it raises none."""
    started = time.monotonic()
    try:
        value = call(*args, **kwargs)
    except Exception as error:
        now = time.monotonic()
        fields = (error.op, error.seq, error.rank, error.peers) if isinstance(error, CommError) else ()
        return Failure(type(error).__name__, str(error), now - started, now, *fields)
    raise AssertionError(f"raised nothing, returned {value!r}")


@dataclasses.dataclass(frozen=True)
class Signals:
    """Flags that ranks and the test raise for one another, as files."""

    directory: str

    def show(self, name: str) -> None:
        (pathlib.Path(self.directory) / name).touch()

    def shown(self, name: str) -> bool:
        return (pathlib.Path(self.directory) / name).exists()

    def wait_for(self, *names: str, timeout: float = 20.0) -> None:
        deadline = time.monotonic() + timeout
        while missing := [name for name in names if not self.shown(name)]:
            assert time.monotonic() < deadline, f"no sign of {missing}"
            time.sleep(0.002)


@contextlib.contextmanager
def group(member: Member, kind: str = "cpu", timeout=20.0, **kwargs):
    """A communicator of `kind` that gives everything back when it is closed."""
    if kind == "remote":
        shm.why_unordered = lambda: "this test says so"
    if kind in NEED_PROCESS_GROUP:
        member.process_group()
    with given_back():
        if kind in NEED_PROCESS_GROUP:
            comm = tcomm.Communicator(name="test", timeout=timeout, **kwargs)
        else:
            comm = member.communicator(timeout=timeout, **kwargs)
        try:
            yield comm
        finally:
            comm.close()


def reduce_ones(comm, kind: str = "cpu", numel: int = 4, **kwargs) -> None:
    """An all-reduce of which the result is checked."""
    algorithm = kind if ":" in kind else KINDS[kind]
    x = torch.arange(float(numel)) + comm.rank
    out = comm.all_reduce(x, algorithm=algorithm, **kwargs)
    expected = comm.world_size * torch.arange(float(numel)) + sum(range(comm.world_size))
    assert torch.equal(out, expected), (out, expected)


def reduce_until_failure(comm, kind: str, signals: Signals, seconds: float = 30.0) -> Failure:
    """All-reduces, one after another, until one fails; shows `busy-RANK` after the first few."""
    deadline = time.monotonic() + seconds
    calls = 0
    while time.monotonic() < deadline:
        calls += 1
        if calls == 3:
            signals.show(f"busy-{comm.rank}")
        started = time.monotonic()
        try:
            reduce_ones(comm, kind)
        except CommError as error:
            now = time.monotonic()
            return Failure(
                type(error).__name__, str(error), now - started, now,
                error.op, error.seq, error.rank, error.peers,
            )  # fmt: skip
    raise AssertionError(f"{calls} calls and no failure in {seconds} s")


class CallInThread:
    """A call of another thread, asked as a `Work` is."""

    def __init__(self, call, *args) -> None:
        self._value = self._error = None
        self._thread = threading.Thread(target=self._run, args=(call, args), daemon=True)
        self._thread.start()

    def _run(self, call, args) -> None:
        try:
            self._value = call(*args)
        except Exception as error:
            self._error = error

    def is_completed(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, timeout: float):
        self._thread.join(timeout)
        assert self.is_completed(), f"still running after {timeout} s"
        if self._error is not None:
            raise self._error
        return self._value


def wait_until_in_flight(comm, work, timeout: float = 10.0) -> None:
    """Return when the thread behind `work` waits for a peer, or has ended."""
    deadline = time.monotonic() + timeout
    while not (work.is_completed() or comm._arena.channel.words[Word.WAITING_FOR]):
        assert time.monotonic() < deadline, "the collective does not begin"
        time.sleep(0.001)


def hang(signals: Signals, name: str) -> None:
    """Show `name` and do nothing until killed."""
    signals.show(name)
    time.sleep(60)


def stop_myself(signals: Signals, name: str) -> None:
    """Show `name` and stop, until somebody sends SIGCONT."""
    signals.show(name)
    os.kill(os.getpid(), signal.SIGSTOP)


def state_of(pid: int) -> str:
    """The state letter of a process in /proc."""
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_until_stopped(pid: int, timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while state_of(pid) != "T":
        assert time.monotonic() < deadline, f"process {pid} does not stop"
        time.sleep(0.002)
