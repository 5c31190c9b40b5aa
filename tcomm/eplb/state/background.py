"""What rearranges experts beside the forward pass, as the state sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tcomm.eplb.state.stepping import Stepping

__all__ = ["BackgroundWorker"]


class BackgroundWorker(Protocol):
    """Rearranges experts while the model runs; a layer switches inside of a step, weights and map at once."""

    def is_busy(self) -> bool:
        """Whether a rearrangement is under way; one that falls due waits for the next step."""
        ...

    def start(self) -> None:
        """Begin to work; once more is nothing."""
        ...

    def on_step(self, state: Stepping) -> None:
        """Called in each step of the main thread, between two forward passes, before it is counted."""
        ...

    def stop(self) -> None:
        """End what is under way, with whole layers, and the work. May be called twice."""
        ...
