"""Fields of a config that are another's."""

from __future__ import annotations

import dataclasses
from typing import Any, Generic, TypeVar

from tcomm.errors import ConfigError
from tcomm.groups.parallel.eplb_config import as_eplb_config

__all__ = ["Forwarded"]

T = TypeVar("T")


class Forwarded(Generic[T]):
    """An older name, in a `ParallelConfig`, of a field of its `eplb_config`, which is the one that counts.

    Args:
        name: the field.
        default: the same as the field's; giving it is giving nothing.
    """

    def __init__(self, name: str, default: T) -> None:
        self.name = name
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.older = name

    def __get__(self, config: Any, owner: type) -> T:
        """The value; of the class, the default, which is where dataclasses look for it."""
        if config is None:
            return self.default
        value: T = getattr(config.eplb_config, self.name)
        return value

    def __set__(self, config: Any, value: T) -> None:
        """Set it, checked; while the config is made, it adds to what `eplb_config` leaves as it is.

        Raises:
            ConfigError: when both names are given and contradict one another, or the value is wrong.
        """
        config.eplb_config = as_eplb_config(config.eplb_config)
        held = getattr(config.eplb_config, self.name)
        is_made = "world_size" in vars(config)
        if not is_made and (value == self.default or value == held):
            return
        if not is_made and held != self.default:
            raise ConfigError(
                f"{self.older}={value!r} contradicts eplb_config.{self.name}={held!r}, of which it is an "
                "older name; give one of them"
            )
        changed = dataclasses.replace(config.eplb_config, **{self.name: value})
        if is_made:
            setattr(config.eplb_config, self.name, value)
        else:
            # The one that was given stays as it is.
            config.eplb_config = changed
