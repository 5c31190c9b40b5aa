"""The few calls of the CUDA runtime that tcomm makes, so that a test can stand in for them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from typing import Any, Protocol

import torch

from tcomm.errors import CapabilityError

__all__ = ["CudaRuntime", "HostRuntime", "Runtime", "StreamOrder"]


class Runtime(Protocol):
    """Streams and captures of one device."""

    def current_stream(self) -> int:
        """Handle of the stream that the caller works on."""
        ...

    def capture_id(self, stream: int) -> int:
        """Number of the capture that `stream` is in; 0 when it is in none."""
        ...

    def let_wait(self, waiting: int, awaited: int) -> None:
        """Make everything on `waiting` from here on come after all that `awaited` has got so far."""
        ...

    def refuse_in_capture(self, what: str) -> None:
        """Check that the current stream is not captured, because `what`.

        Raises:
            CapabilityError: when it is; says how to do it before.
        """
        ...

    def is_current(self) -> bool:
        """Whether the device is the one that launches go to."""
        ...

    def on_device(self) -> contextlib.AbstractContextManager[object]:
        """Make the device current."""
        ...

    def synchronise(self) -> None:
        """Wait for everything on the device."""
        ...


class HostRuntime:
    """Of host memory: one stream, no captures."""

    def current_stream(self) -> int:
        """0."""
        return 0

    def capture_id(self, stream: int) -> int:
        """0."""
        del stream
        return 0

    def let_wait(self, waiting: int, awaited: int) -> None:
        """Nothing: everything is done in order."""

    def refuse_in_capture(self, what: str) -> None:
        """Nothing."""

    def is_current(self) -> bool:
        """True."""
        return True

    def on_device(self) -> contextlib.AbstractContextManager[object]:
        """Nothing."""
        return contextlib.nullcontext()

    def synchronise(self) -> None:
        """Nothing: everything is done."""


class CudaRuntime:
    """Of one CUDA device.

    Args:
        device: with an index.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._get_stream = torch._C._cuda_getCurrentRawStream

    def current_stream(self) -> int:
        """Handle of torch's current stream of the device."""
        return int(self._get_stream(self.device.index))

    def capture_id(self, stream: int) -> int:
        """Number of the capture that `stream` is in; 0 when it is in none."""
        # What torch has looks at the current stream only, and has no number.
        if not torch.cuda.is_current_stream_capturing() and stream == self.current_stream():
            return 0
        status, number = ctypes.c_int(0), ctypes.c_uint64(0)
        failed = _capture_info()(
            ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None
        )
        return number.value if not failed and status.value == _CAPTURING else 0

    def let_wait(self, waiting: int, awaited: int) -> None:
        """Make everything on `waiting` from here on come after all that `awaited` has got so far."""
        event = torch.cuda.Event()
        event.record(self._stream(awaited))
        event.wait(self._stream(waiting))

    def _stream(self, handle: int) -> torch.cuda.Stream:
        # ExternalStream(0) is any stream out of torch's pool, and not the default stream.
        if handle == 0:
            return torch.cuda.default_stream(self.device)
        return torch.cuda.ExternalStream(handle, device=self.device)

    def refuse_in_capture(self, what: str) -> None:
        """Check that the current stream is not captured, because `what`.

        Raises:
            CapabilityError: when it is; says how to do it before.
        """
        if torch.cuda.is_current_stream_capturing():
            raise CapabilityError(
                f"{what}, which cannot be done while a graph is captured; call prepare(max_nbytes, dtypes) "
                "before the capture, and make calls of this kind once, on every rank"
            )

    def is_current(self) -> bool:
        """Whether the device is torch's current one."""
        return bool(torch._C._cuda_getDevice() == self.device.index)

    def on_device(self) -> contextlib.AbstractContextManager[object]:
        """Make the device current."""
        return torch.cuda.device(self.device)

    def synchronise(self) -> None:
        """Wait for everything on the device."""
        torch.cuda.synchronize(self.device)


_CAPTURING = 1


@functools.cache
def _capture_info() -> Any:
    """The driver's own question, in its form of CUDA 12 and 13: stream, state, number, and more."""
    return ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2


class StreamOrder:
    """One order of the calls of a group, on whatever streams they are made.

    An eager call on another stream than the last eager one waits for that; likewise inside a capture, on the
    streams of the capture. Between captures, and between them and eager calls, the order of launches and
    replays counts, since all of them advance the epoch on the device; that order is the caller's.

    Args:
        runtime: of the device.
        group: name, for errors.
    """

    def __init__(self, runtime: Runtime, group: str) -> None:
        self._runtime = runtime
        self._group = group
        self._eager: int | None = None
        self._captured: tuple[int, int] | None = None

    def enter(self) -> None:
        """Before a call is launched on the current stream.

        Raises:
            CapabilityError: when a graph is captured while the capture of another one uses the group, or the
                stream of the last eager call is captured and this one, elsewhere, should wait for it.
        """
        stream = self._runtime.current_stream()
        capture = self._runtime.capture_id(stream)
        if capture:
            self._enter_capture(stream, capture)
            return
        last, self._eager = self._eager, stream
        if last is not None and last != stream:
            if self._runtime.capture_id(last):
                self._eager = last
                raise CapabilityError(
                    f"group {self._group!r} was last called on a stream that is captured now, for which a "
                    "call on another stream cannot wait; capture on a stream of its own, as "
                    "graph_capture() does"
                )
            self._runtime.let_wait(stream, last)

    def _enter_capture(self, stream: int, capture: int) -> None:
        if self._captured is not None:
            last_capture, last_stream = self._captured
            if last_capture == capture:
                if last_stream != stream:
                    self._runtime.let_wait(stream, last_stream)
            elif self._runtime.capture_id(last_stream) == last_capture:
                raise CapabilityError(
                    f"group {self._group!r} is used by two graphs that are captured at the same time; "
                    "their replays could overlap. Capture one after the other, or give one a group by split()"
                )
        self._captured = capture, stream
