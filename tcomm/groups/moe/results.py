"""Results that lie in a workspace: how many may be alive, and which are."""

from __future__ import annotations

import weakref

from tcomm.errors import UsageError

__all__ = ["MOST_RESULTS", "Results"]

MOST_RESULTS = 2
"""A workspace has memory for so many: one for each parity."""


class Results:
    """Results that lie in memory which later calls use again.

    A result is alive from its dispatch until it is combined, or nobody holds it any more.

    Args:
        what: whose results, for errors.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._alive: list[tuple[int, weakref.ref[object]]] = []
        self._made = 0

    def refuse_another(self) -> None:
        """Check that there is room for one more, before anything is sent.

        Raises:
            UsageError: when two are alive.
        """
        self._alive = [entry for entry in self._alive if entry[1]() is not None]
        if len(self._alive) >= MOST_RESULTS:
            told = " and ".join(f"#{number}" for number, _ in self._alive)
            raise UsageError(
                f"{self._what}: results {told} are alive, memory is for {MOST_RESULTS}; combine one, "
                "or drop its handle, before the next dispatch"
            )

    def admit(self, result: object) -> None:
        """Count a result from now on."""
        self._made += 1
        self._alive.append((self._made, weakref.ref(result)))

    def release(self, result: object) -> None:
        """Stop counting one: it was combined. Nothing happens when it is not counted."""
        self._alive = [entry for entry in self._alive if entry[1]() not in (None, result)]

    def clear(self) -> None:
        """Let no result be alive any more."""
        self._alive.clear()

    @property
    def alive(self) -> list[object]:
        """Those whose memory is still their own."""
        return [found for _, ref in self._alive if (found := ref()) is not None]

    def is_alive(self, result: object) -> bool:
        """Whether its memory is still its own."""
        return any(entry[1]() is result for entry in self._alive)
