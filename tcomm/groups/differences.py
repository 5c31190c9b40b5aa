"""In what ranks differ that should not."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Mapping, Sequence

from tcomm.errors import GroupMismatchError

__all__ = ["describe_differences", "installed_version", "refuse_differences"]


@functools.cache
def installed_version() -> str:
    """The version of tcomm that is installed, or `source`."""
    try:
        return importlib.metadata.version("tcomm")
    except importlib.metadata.PackageNotFoundError:
        return "source"


def describe_differences(name: str, settings: Mapping[int, Mapping[str, str]]) -> str:
    """A table of the settings that are not the same on every rank of a group; empty when all are.

    Args:
        name: of the group.
        settings: of each rank that is known of.
    """
    lines = []
    for key in dict.fromkeys(key for same in settings.values() for key in same):
        values = {rank: same.get(key, "(unknown)") for rank, same in sorted(settings.items())}
        if len(set(values.values())) > 1:
            lines += [f"  {key}:"] + [f"    rank {rank}: {value!r}" for rank, value in values.items()]
    if not lines:
        return ""
    return "\n".join([f"the ranks of group {name!r} have different settings", *lines, "make them the same"])


def refuse_differences(name: str, settings: Sequence[Mapping[str, str]]) -> None:
    """Raise unless all ranks have the same settings.

    Args:
        name: of the group.
        settings: of each rank, in order.

    Raises:
        GroupMismatchError: with a table of what differs.
    """
    told = describe_differences(name, dict(enumerate(settings)))
    if told:
        raise GroupMismatchError(told)
