"""Work that a GPU still has to do, and that peers must not be told of before it is done."""

from __future__ import annotations

import torch

__all__ = ["DeviceWork"]


class DeviceWork:
    """The copies of one mover on its device; on a host they are done when they return.

    Args:
        device: of the weights.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._written: torch.cuda.Event | None = None

    def wait_for_rows(self) -> None:
        """Wait until what this thread copied is where peers read it."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def note_weights(self) -> None:
        """Remember what this thread's stream has been given: it reads peers' rows, and writes weights."""
        if self._device.type == "cuda":
            self._written = self._written or torch.cuda.Event()
            self._written.record(torch.cuda.current_stream(self._device))

    def wait_for_weights(self) -> None:
        """Wait until that is done, whichever stream it is in."""
        if self._written is not None:
            self._written.synchronize()
