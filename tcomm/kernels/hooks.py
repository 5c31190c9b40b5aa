"""What an interpreted kernel calls on the host while it waits.

The compiled twin of `pause` is an empty jit function of the same name in `device.py`: the CUDA compiler
refuses a plain Python function even in a dead branch.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from tcomm.memory.channel import Channel

__all__ = ["interpreting", "pause"]

# The interpreter keeps the grid index in one global object: one launch at a time in a process.
_one_launch = threading.Lock()
_channel: Channel | None = None


@contextlib.contextmanager
def interpreting(channel: Channel) -> Iterator[None]:
    """While a kernel that waits on `channel` is interpreted."""
    global _channel  # noqa: PLW0603 - guarded by the lock
    with _one_launch:
        _channel = channel
        try:
            # Overflow and NaN are values on a GPU, and no warnings.
            with np.errstate(all="ignore"):
                yield
        finally:
            _channel = None


def pause(phase: Any, block: Any, word: Any) -> int:
    """Let peers run; 0 to poll again, 1 to give the wait up."""
    if _channel is None:
        raise RuntimeError("an interpreted kernel waits outside of `interpreting`")
    return _channel.kernel_pause(_as_int(phase), _as_int(block), _as_int(word) & 0xFFFFFFFFFFFFFFFF)


def _as_int(value: Any) -> int:
    handle = getattr(value, "handle", None)
    return int(value) if handle is None else int(handle.data.item())
