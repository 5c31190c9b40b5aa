"""Capturing collectives into CUDA graphs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from tcomm.errors import ConfigError

if TYPE_CHECKING:
    from tcomm.groups.communicator import Communicator

__all__ = ["GraphCaptureContext", "graph_capture"]


@dataclasses.dataclass
class GraphCaptureContext:
    """What code that captures a graph needs to know."""

    stream: torch.cuda.Stream | None
    """The stream to capture on, current inside `graph_capture`; None on a CPU, where nothing is captured."""


@contextlib.contextmanager
def graph_capture(
    *communicators: Communicator,
    device: torch.device | str | None = None,
    context: GraphCaptureContext | None = None,
) -> Iterator[GraphCaptureContext]:
    """Surround code that captures graphs in which these communicators are used. **Collective** to enter.

    All ranks have arrived, and so are warm, before any of them captures; the capture has a stream of its own,
    which starts after all that the current one has got so far. What a graph needs has been made before:
    `prepare(max_nbytes, dtypes)`, and one call of each kind.

    Args:
        *communicators: used by the graphs.
        device: of the tensors; None: the current CUDA device, or the CPU where there is none.
        context: of an outer `graph_capture`, whose stream is used again.

    Yields:
        The context. On a CPU its stream is None and code inside runs as it is.

    Raises:
        ConfigError: when an argument is no communicator.
        PeerLostError, PeerTimeoutError: when a rank did not come.
    """
    for communicator in communicators:
        if not hasattr(communicator, "barrier"):
            raise ConfigError(f"{communicator!r} is no Communicator; give those that the graphs use")
        communicator.barrier()
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cpu":
        yield context or GraphCaptureContext(None)
        return
    stream = context.stream if context is not None else None
    if stream is None:
        stream = torch.cuda.Stream(torch.device(device))
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield context or GraphCaptureContext(stream)
