"""Handles that live as long as somebody uses them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from tcomm.errors import UsageError

__all__ = ["Cache"]


class Cache:
    """Objects by the arguments that they were made with, held weakly: who asks for one has to keep it."""

    def __init__(self) -> None:
        self._made: weakref.WeakValueDictionary[tuple[tuple[str, Hashable], ...], Any] = (
            weakref.WeakValueDictionary()
        )
        self._lock = threading.RLock()

    def get_or_create(self, kwargs: Mapping[str, Hashable], func: Callable[..., Any]) -> Any:
        """The object that was made with these arguments and is still alive, else a new one.

        **Collective** where `func` is. While one is made other threads wait; `func` may ask for others.

        Args:
            kwargs: by name, in any order; process groups count by identity.
            func: called as `func(**kwargs)` where there is none.

        Raises:
            UsageError: when a value cannot be hashed; nothing was made.
        """
        key = tuple(sorted(kwargs.items(), key=lambda entry: entry[0]))
        try:
            hash(key)
        except TypeError as error:
            raise UsageError(f"a handle is found by what it was made with: {error}") from None
        with self._lock:
            found = self._made.get(key)
            if found is None:
                found = self._made[key] = func(**kwargs)
            return found

    def alive(self) -> list[Any]:
        """The objects that somebody still keeps, in no order."""
        with self._lock:
            return list(self._made.values())

    def clear(self) -> None:
        """Forget all of them; those that somebody keeps stay his."""
        with self._lock:
            self._made.clear()
