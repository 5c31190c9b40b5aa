"""What an interpreted kernel calls on the host while it waits.

The compiled twin of `pause` is an empty jit function of the same name in `device.py`: the CUDA compiler
refuses a plain Python function even in a dead branch.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

__all__ = ["Waiter", "axis_rank", "interpreting", "pause"]


class Waiter(Protocol):
    """Waits on behalf of an interpreted kernel: a `Channel`, a `PairWait`, or all `VirtualRanks`."""

    @property
    def axis_rank(self) -> int:
        """Which of the ranks of this launch runs."""
        ...

    def kernel_pause(self, phase: int, block: int, word: int) -> int:
        """Let peers run between two polls; 0 to poll again, 1 to give the wait up."""
        ...


# The interpreter keeps the grid index in one global object: one launch at a time in a process.
_one_launch = threading.Lock()
_waiter: Waiter | None = None


@contextlib.contextmanager
def interpreting(waiter: Waiter) -> Iterator[None]:
    """While a kernel that waits by `waiter` is interpreted."""
    global _waiter  # noqa: PLW0603 - guarded by the lock
    with _one_launch:
        _waiter = waiter
        try:
            # Overflow and NaN are values on a GPU, and no warnings.
            with np.errstate(all="ignore"):
                yield
        finally:
            _waiter = None


def axis_rank() -> int:
    """Which of the ranks of one launch is interpreted now; 0 where each launch is one rank's."""
    return 0 if _waiter is None else _waiter.axis_rank


def pause(phase: Any, block: Any, word: Any, polls: Any = 0, budget: Any = 0) -> int:
    """Let peers run; 0 to poll again, 1 to give up: after `budget` polls, or when the waiter says so."""
    if 0 < _as_int(budget) <= _as_int(polls) + 1:
        return 1
    if _waiter is None:
        raise RuntimeError("an interpreted kernel waits outside of `interpreting`")
    return _waiter.kernel_pause(_as_int(phase), _as_int(block), _as_int(word) & 0xFFFFFFFFFFFFFFFF)


def _as_int(value: Any) -> int:
    handle = getattr(value, "handle", None)
    return int(value) if handle is None else int(handle.data.item())
