"""The classes that may travel: each by its name and fields, and only where both sides have registered it."""

from __future__ import annotations

import collections
import dataclasses
import enum
import hashlib
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch

from tcomm.errors import ConfigError, DecodeError

__all__ = ["ErrorText", "Registered", "find_registered", "register", "registered_named"]

C = TypeVar("C", bound=type)
_CONTAINERS = (
    int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, np.ndarray, torch.Tensor,
    BaseException,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Registered:
    """A class that may travel.

    Attributes:
        cls: the class.
        name: module and qualified name, under which it travels.
        fields: what travels of an instance, in order.
        take: the values of an instance's fields.
        make: an instance, called with such values.
        members: names of the members of an enum.
    """

    cls: type
    name: str
    fields: tuple[str, ...]
    take: Callable[[Any], Sequence[object]]
    make: Callable[..., object]
    members: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> int:
        """64 bits over names of class, fields and members: equal where both sides have the same class."""
        told = "\n".join((self.name, *self.fields, "", *self.members)).encode()
        return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "little")


_by_class: dict[type, tuple[Registered, int]] = {}
_by_name: dict[str, tuple[Registered, int]] = {}


def register(cls: C) -> C:
    """Let instances of a class travel; usable as a decorator. Every process that receives them needs it.

    Dataclasses, msgspec Structs, named tuples, enums and `collections.OrderedDict` can be registered. The
    receiver calls the class with the fields, so its `__post_init__` checks them; their annotations do not.

    Args:
        cls: the class itself; its subclasses are classes of their own.

    Raises:
        ConfigError: when it is none of these, has fields that its constructor does not take, or another
            class of the same name is registered.
    """
    if cls in _by_class:
        return cls
    entry = _describe(cls)
    if entry.name in _by_name:
        raise ConfigError(f"another class named {entry.name} is registered; give one of them another name")
    _by_name[entry.name] = _by_class[cls] = (entry, entry.fingerprint)
    return cls


def find_registered(cls: type) -> tuple[Registered, int] | None:
    """The entry of a class and its fingerprint, or None."""
    return _by_class.get(cls)


def registered_named(name: str, fingerprint: int) -> Registered:
    """The entry of a class that a sender named.

    Raises:
        DecodeError: when it is not registered here, or has other fields here.
    """
    entry, own = _by_name.get(name, (None, 0))
    if entry is None:
        raise DecodeError(
            f"received a {str(name)[:200]!r}, which is not registered here; "
            "call tcomm.objects.codec.register with the class in every process that receives it"
        )
    if own != fingerprint:
        raise DecodeError(
            f"received a {name} of other fields than {', '.join(entry.fields)}, which it has here; "
            "run the same version of it in every process"
        )
    return entry


def _describe(cls: Any) -> Registered:
    name = f"{cls.__module__}.{cls.__qualname__}"
    if cls is collections.OrderedDict:
        return Registered(cls, name, ("items",), lambda value: [list(value.items())], cls)
    if issubclass(cls, enum.Enum) and not issubclass(cls, enum.Flag):
        members = tuple(cls.__members__)
        return Registered(cls, name, ("name",), lambda value: [value.name], lambda name: cls[name], members)
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return Registered(cls, name, cls._fields, tuple, cls)
    has_fields = not issubclass(cls, _CONTAINERS) and dataclasses.is_dataclass(cls)
    if not has_fields and not issubclass(cls, msgspec.Struct):
        raise ConfigError(
            f"{name} cannot be registered: it is no dataclass, msgspec.Struct, NamedTuple or plain Enum; "
            "give it as one of these, or send its parts"
        )
    return _describe_fields(cls, name)


def _describe_fields(cls: Any, name: str) -> Registered:
    if issubclass(cls, msgspec.Struct):
        fields = cls.__struct_fields__
    else:
        fields = tuple(field.name for field in dataclasses.fields(cls))
    if set(inspect.signature(cls).parameters) != set(fields):
        raise ConfigError(
            f"{name} cannot be registered: its fields are {', '.join(fields)}, its constructor takes others; "
            "leave init=False, InitVar and __init__ of its own out"
        )

    def make(*values: object) -> object:
        return cls(**dict(zip(fields, values, strict=True)))

    if len(fields) > 1:
        return Registered(cls, name, fields, operator.attrgetter(*fields), make)
    return Registered(cls, name, fields, lambda value: [getattr(value, field) for field in fields], make)


@register
class ErrorText(msgspec.Struct, frozen=True):
    """An exception as text, since an exception itself does not travel."""

    kind: str
    """Name of its class."""
    text: str
    """Its message."""

    @classmethod
    def of(cls, error: BaseException) -> ErrorText:
        """What is left of an exception for other processes."""
        return cls(type(error).__name__, str(error))

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"
