"""What a process holds that it has to give back: descriptors, threads, children, names of memory."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import pathlib
import time

SETTLE_SECONDS = 4.0
OF_TORCH = "pt_gloo"
"""Threads that a process group starts when it needs them, and keeps."""
PRIVATE_PREFIX = "tcomm-faults-"
"""Of the directories in /dev/shm that these tests make."""


@dataclasses.dataclass(frozen=True)
class Holdings:
    """Everything that ought to be as before."""

    descriptors: dict[str, str]
    threads: dict[str, str]
    children: dict[int, str]

    @classmethod
    def of_this_process(cls) -> Holdings:
        return cls(_descriptors(), _threads(), _descendants(os.getpid()))

    def added_since(self, before: Holdings) -> dict[str, dict]:
        """What is here and was not before, by kind."""
        added = {}
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(before, field.name)
            fresh = {key: value for key, value in mine.items() if theirs.get(key) != value}
            if fresh:
                added[field.name] = fresh
        return added


def _descriptors() -> dict[str, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return found


def _threads() -> dict[str, str]:
    found = {}
    for task in pathlib.Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            name = (task / "comm").read_text().strip()
            if not name.startswith(OF_TORCH):
                found[task.name] = name
    return found


def _descendants(pid: int) -> dict[int, str]:
    found = {}
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                with contextlib.suppress(FileNotFoundError):
                    found[child] = pathlib.Path(f"/proc/{child}/stat").read_text().rpartition(")")[0]
                found |= _descendants(child)
    return found


def assert_as_before(before: Holdings) -> None:
    """Fail unless what this process has taken since `before` is given back, now or within seconds."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while added := Holdings.of_this_process().added_since(before):
        assert time.monotonic() < deadline, f"not given back: {added}"
        gc.collect()
        time.sleep(0.02)


@contextlib.contextmanager
def given_back():
    """All that the block takes is given back when it ends well."""
    before = Holdings.of_this_process()
    yield
    assert_as_before(before)


def shared_names() -> set[str]:
    """Names in /dev/shm, less those of other runs of tcomm; ours are in a directory of their own."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("tcomm-")}


def assert_no_new_names(before: set[str]) -> None:
    """Fail when a name that is new in /dev/shm stays; other programs may make some that do not."""
    deadline = time.monotonic() + SETTLE_SECONDS
    new = shared_names() - before
    while new:
        assert time.monotonic() < deadline, f"names left in /dev/shm: {sorted(new)}"
        time.sleep(0.05)
        new &= shared_names()
