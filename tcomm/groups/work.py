"""The handle of a collective that runs behind the caller's back."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any

from tcomm.errors import PeerTimeoutError

__all__ = ["Work"]


class Work:
    """A collective in flight. Tensors that were given to it belong to it until it is complete."""

    def __init__(
        self,
        future: concurrent.futures.Future[Any],
        explain_delay: Callable[[str], PeerTimeoutError],
    ) -> None:
        self._future = future
        self._explain_delay = explain_delay

    def is_completed(self) -> bool:
        """Whether it has ended, well or badly."""
        return self._future.done()

    def wait(self, timeout: float | None = None) -> Any:
        """Wait for the result, as long as the collective's own deadline allows.

        Args:
            timeout: seconds to wait here; the collective goes on when they are over.

        Returns:
            What the collective gives: its output tensor, or None on a rank that gets none.

        Raises:
            PeerTimeoutError: when `timeout` is over; names who is waited for.
            CommError: what the collective raised.
        """
        try:
            return self._future.result(timeout)
        except concurrent.futures.TimeoutError as error:
            if self._future.done():
                raise
            raise self._explain_delay(f"not complete after {timeout:g} s; it goes on") from error
