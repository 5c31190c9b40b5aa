"""Groups by name: compiled graphs name a group, since they cannot hold one."""

from __future__ import annotations

import collections
import threading
import weakref
from typing import Protocol

import torch

from tcomm.errors import ConfigError, UsageError

__all__ = ["RegisteredGroup", "find_group", "living_groups", "next_number", "register", "unique_name"]


class RegisteredGroup(Protocol):
    """What a group needs so that ops can call it by its name. Each method gives a tensor of its own."""

    @property
    def unique_name(self) -> str:
        """By which it is found."""

    @property
    def world_size(self) -> int:
        """Number of its ranks."""

    @property
    def destroyed(self) -> bool:
        """Whether it has ended."""

    def _all_reduce_out_place(self, x: torch.Tensor, /) -> torch.Tensor: ...

    def _all_gather_out_place(self, x: torch.Tensor, dim: int, /) -> torch.Tensor: ...

    def _reduce_scatter_out_place(self, x: torch.Tensor, dim: int, /) -> torch.Tensor: ...


_groups: dict[str, weakref.ref[RegisteredGroup]] = {}
_lock = threading.Lock()
_counters: collections.Counter[str] = collections.Counter()


def unique_name(base: str, at_least: int = 0) -> str:
    """A name that no group of this process had before: `tp:0`, then `tp:1`.

    Args:
        base: what the group is for. Ranks that make their groups in one order get the same names.
        at_least: the number that it has at least, where other ranks have come farther.
    """
    with _lock:
        number = max(_counters[base], at_least)
        _counters[base] = number + 1
        return f"{base}:{number}"


def next_number(base: str) -> int:
    """The number that `unique_name` would give next."""
    return _counters[base]


def register(group: RegisteredGroup) -> None:
    """Let ops find `group` by its `unique_name`, for as long as somebody holds it.

    Raises:
        ConfigError: when another group that is alive has the name.
    """
    with _lock:
        known = _groups.get(group.unique_name)
        other = None if known is None else known()
        if other is not None and other is not group and not other.destroyed:
            raise ConfigError(
                f"another group is called {group.unique_name!r}; take a name from unique_name(), "
                "or destroy that group first"
            )
        _groups[group.unique_name] = weakref.ref(group)


def find_group(name: str) -> RegisteredGroup:
    """The group of that name.

    Raises:
        UsageError: when there never was one.
        ConfigError: when it is destroyed, or nobody holds it any more.
    """
    reference = _groups.get(name)
    if reference is None:
        raise UsageError(f"Group {name} is not found.")
    group = reference()
    if group is None or group.destroyed:
        raise ConfigError(f"Group {name} is destroyed.")
    return group


def living_groups() -> list[RegisteredGroup]:
    """Every group that is registered and not destroyed."""
    with _lock:
        known = [reference() for reference in _groups.values()]
    return [group for group in known if group is not None and not group.destroyed]
