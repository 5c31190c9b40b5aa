"""What a call leaves behind for streams of a GPU to wait for."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import torch

__all__ = ["EventOverlap"]


class EventOverlap:
    """The moment at which a call's work on a GPU ends. On a CPU it has ended when the call returns.

    Also a context manager: what stands inside of it is given to the GPU before the wait.

    Args:
        event: of the moment; None where there is nothing to wait for.
        extra_tensors: kept alive until then.
    """

    def __init__(
        self, event: torch.cuda.Event | None = None, extra_tensors: tuple[torch.Tensor, ...] | None = None
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    @classmethod
    def now(cls) -> Self:
        """The end of what the current stream has been given so far."""
        if not torch.cuda.is_initialized():
            return cls()
        event = torch.cuda.Event()
        event.record()
        return cls(event)

    def current_stream_wait(self) -> None:
        """Let the current stream wait; the host does not."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.current_stream_wait()
