"""What carries out the calls of a group that is given as an object or by name."""

from __future__ import annotations

import functools
import weakref
from typing import Any, NamedTuple, cast

import torch.distributed as dist

from tcomm.errors import ConfigError
from tcomm.groups.communicator import Communicator
from tcomm.groups.compiled.registry import find_group, living_groups, unique_name
from tcomm.memory.exchange import Store

__all__ = ["Engine", "find_engine", "find_torch_engine", "name_of"]


class Engine(NamedTuple):
    """A communicator, and the algorithm that the group's calls ask for."""

    communicator: Communicator
    algorithm: str


_objects: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_names: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def name_of(group: object) -> str:
    """A name by which ops find `group`, for as long as somebody holds it.

    Args:
        group: the name of a registered group; a Communicator; or what has one, as device communicators and
            group coordinators do.

    Raises:
        ConfigError: when it is none of these.
    """
    if isinstance(group, str):
        return group
    try:
        return _names[group]
    except (KeyError, TypeError):
        _engine_of(group)
    name = unique_name("object")
    _objects[name] = group
    _names[group] = name
    return name


def find_engine(name: str) -> Engine:
    """What carries out the calls of the group of that name.

    Raises:
        UsageError: when there never was one.
        ConfigError: when it is destroyed, or nobody holds it any more.
    """
    group = _objects.get(name)
    if group is not None:
        return _engine_of(group)
    if name.startswith("object:"):
        raise ConfigError(f"Group {name} is destroyed.")
    return _engine_of(find_group(name))


def find_torch_engine(name: str) -> Engine | None:
    """What carries out the calls of the registered group whose `device_group` torch knows by that name."""
    for group in living_groups():
        torch_group = getattr(group, "device_group", None)
        if torch_group is not None and torch_group.group_name == name:
            return _engine_of(group)
    return None


def _engine_of(group: Any) -> Engine:
    if isinstance(group, Communicator):
        return Engine(group, "")
    if getattr(group, "destroyed", False):
        raise ConfigError(f"Group {group.unique_name} is destroyed.")
    if isinstance(communicator := getattr(group, "communicator", None), Communicator):
        return Engine(communicator, group.algorithm)
    if (device := getattr(group, "device_communicator", None)) is not None:
        return _engine_of(device)
    if getattr(group, "world_size", None) == 1:
        return Engine(_alone(), "")
    raise ConfigError(
        f"{group!r} is no group: give a Communicator, what has one, or the name of a registered group"
    )


@functools.cache
def _alone() -> Communicator:
    """For groups of one, which have no communicator of their own."""
    store = cast("Store", dist.HashStore())  # type: ignore[attr-defined]
    return Communicator.from_store(store, 0, 1, name="alone")
