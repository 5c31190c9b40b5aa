"""The sender's side of the codec: values as a structure for msgpack, and buffers that are not copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import msgspec
import numpy as np
import torch

from tcomm.errors import ConfigError
from tcomm.objects.arrays import NUMBERS, TENSOR_DTYPES, array_bytes, number_name, tensor_bytes
from tcomm.objects.layout import INLINE_BYTES, Tag, is_plain
from tcomm.objects.registry import Registered, find_registered

__all__ = ["Packer", "encode_plain"]

encode_plain = msgspec.msgpack.Encoder().encode
"""A plain value as msgpack; OverflowError or UnicodeEncodeError for integers and text that msgpack lacks."""
_SIMPLE = frozenset({type(None), bool, float})
_MIN_INT, _MAX_INT = -(2**63), 2**64 - 1
_PLAIN, _LIST, _TUPLE, _DICT, _SET, _FROZENSET, _INT, _STR = (int(tag) for tag in list(Tag)[:8])


class _Step(str):
    """A part of a path that is no index and no key."""

    __slots__ = ()


class Packer:
    """One message in the making.

    Args:
        max_depth: containers that may lie in one another.

    Attributes:
        buffers: large payloads in the order in which the structure mentions them.
    """

    def __init__(self, max_depth: int) -> None:
        self.buffers: list[memoryview] = []
        self._max_depth = max_depth
        self._trail: list[object] = []

    def pack(self, value: Any) -> object:
        """What msgpack is given for `value`.

        Raises:
            ConfigError: when something in it may not travel or lies too deep; says where.
        """
        kind = type(value)
        pack = _PACKERS.get(kind)
        if pack is not None:
            return pack(self, value)
        if (found := find_registered(kind)) is not None:
            return self._registered(value, *found)
        if issubclass(kind, np.generic) and number_name(value.dtype) in NUMBERS:
            return [int(Tag.NUMBER), number_name(value.dtype), value.tobytes()]
        return self.refuse(_why_not(kind))

    def pack_tagged(self, value: Any) -> object:
        """As `pack`, of a value that is known not to be plain; so nobody looks again."""
        kind = type(value)
        if kind is dict:
            return self._pairs(value)
        return self._items([_LIST], value) if kind is list else self.pack(value)

    def refuse(self, reason: str) -> NoReturn:
        """Say that what is being packed may not travel.

        Raises:
            ConfigError: always.
        """
        trail = self._trail if len(self._trail) <= _TOLD_STEPS else [*self._trail[:_TOLD_STEPS], _Step("...")]
        path = "".join(step if type(step) is _Step else f"[{_short(step)}]" for step in trail)
        raise ConfigError(f"value{path} {reason}")

    def _enter(self) -> None:
        if len(self._trail) >= self._max_depth:
            self.refuse(
                f"lies more than {self._max_depth} containers deep, or in itself; "
                "send a flatter value, or give both sides a larger max_depth"
            )
        self._trail.append(None)

    def _plain(self, value: object) -> list[object] | None:
        """A subtree that needs no tags, as it is."""
        if not is_plain(value, self._max_depth - len(self._trail)):
            return None
        try:
            return [_PLAIN, msgspec.Raw(encode_plain(value))]
        except (OverflowError, UnicodeEncodeError):
            return None

    def _registered(self, value: object, entry: Registered, fingerprint: int) -> object:
        try:
            values = entry.take(value)
        except AttributeError as error:
            self.refuse(f"lacks a field: {error}")
        self._enter()
        packed: list[object] = [int(Tag.REGISTERED), entry.name, fingerprint]
        for field, item in zip(entry.fields, values, strict=True):
            self._trail[-1] = _Step(f".{field}")
            packed.append(self.pack(item))
        self._trail.pop()
        return packed

    def _list(self, value: list[Any]) -> object:
        return self._plain(value) or self._items([_LIST], value)

    def _tuple(self, value: tuple[Any, ...]) -> object:
        return self._items([_TUPLE], value)

    def _items(self, packed: list[object], items: list[Any] | tuple[Any, ...]) -> list[object]:
        self._enter()
        trail, pack = self._trail, self.pack
        for index, item in enumerate(items):
            trail[-1] = index
            packed.append(pack(item))
        trail.pop()
        return packed

    def _dict(self, value: dict[Any, Any]) -> object:
        return self._plain(value) or self._pairs(value)

    def _pairs(self, value: dict[Any, Any]) -> object:
        self._enter()
        trail, pack = self._trail, self.pack
        packed: list[object] = [_DICT]
        for key, item in value.items():
            if type(key) is str and key.isascii():
                packed.append(key)
            else:
                trail[-1] = _KEYS
                packed.append(pack(key))
            trail[-1] = key
            kind = type(item)
            is_itself = kind in _SIMPLE or (kind is str and item.isascii())
            packed.append(item if is_itself else pack(item))
        trail.pop()
        return packed

    def _set(self, value: set[Any]) -> object:
        return self._elements([_SET], value)

    def _frozenset(self, value: frozenset[Any]) -> object:
        return self._elements([_FROZENSET], value)

    def _elements(self, packed: list[object], elements: set[Any] | frozenset[Any]) -> list[object]:
        self._enter()
        self._trail[-1] = _ELEMENTS
        packed.extend(map(self.pack, elements))
        self._trail.pop()
        return packed

    def _int(self, value: int) -> object:
        if _MIN_INT <= value <= _MAX_INT:
            return value
        return [_INT, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)]

    def _str(self, value: str) -> object:
        if value.isascii():
            return value
        try:
            value.encode()
        except UnicodeEncodeError:
            return [_STR, value.encode(errors="surrogatepass")]
        return value

    def _scalar(self, value: object) -> object:
        return value

    def _bytes(self, value: bytes) -> object:
        if len(value) <= INLINE_BYTES:
            return value
        self.buffers.append(memoryview(value))
        return [int(Tag.BYTES)]

    def _bytearray(self, value: bytearray) -> object:
        self.buffers.append(memoryview(value))
        return [int(Tag.BYTEARRAY)]

    def _array(self, value: np.ndarray[Any, Any]) -> object:
        name = number_name(value.dtype)
        if name not in NUMBERS or value.dtype != NUMBERS[name]:
            self.refuse(f"is an array of dtype {value.dtype}; only numbers and bools travel")
        self.buffers.append(array_bytes(value))
        return [int(Tag.ARRAY), name, list(value.shape)]

    def _tensor(self, value: torch.Tensor) -> object:
        if value.requires_grad:
            self.refuse("is a tensor that requires grad, which would be lost; give its .detach()")
        if value.layout != torch.strided:
            self.refuse(f"is a tensor of layout {value.layout}; give its .to_dense()")
        name = str(value.dtype).removeprefix("torch.")
        if name not in TENSOR_DTYPES or value.is_nested:
            self.refuse(f"is a quantised or nested tensor of {value.dtype}; give its parts")
        if value.device.type == "meta":
            self.refuse("is a tensor on the device meta, which has no elements; send its shape and dtype")
        self.buffers.append(tensor_bytes(value))
        return [int(Tag.TENSOR), name, value.device.type, list(value.shape)]

    def _dtype(self, value: torch.dtype) -> object:
        return [int(Tag.DTYPE), str(value).removeprefix("torch.")]

    def _device(self, value: torch.device) -> object:
        return [int(Tag.DEVICE), value.type, value.index]

    def _size(self, value: torch.Size) -> object:
        return [int(Tag.SIZE), *value]


_PACKERS: dict[type, Callable[[Packer, Any], object]] = {
    type(None): Packer._scalar,
    bool: Packer._scalar,
    float: Packer._scalar,
    int: Packer._int,
    str: Packer._str,
    bytes: Packer._bytes,
    bytearray: Packer._bytearray,
    list: Packer._list,
    tuple: Packer._tuple,
    dict: Packer._dict,
    set: Packer._set,
    frozenset: Packer._frozenset,
    np.ndarray: Packer._array,
    torch.Tensor: Packer._tensor,
    torch.dtype: Packer._dtype,
    torch.device: Packer._device,
    torch.Size: Packer._size,
}
_KEYS = _Step(".keys()")
_ELEMENTS = _Step("{...}")
_TOLD_STEPS = 12


def _short(step: object) -> str:
    told = repr(step)
    return told if len(told) <= 40 else f"{told[:37]}..."


def _why_not(kind: type) -> str:
    """What a value of a type that may not travel is, and what to do."""
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    if issubclass(kind, BaseException):
        return f"is a {name}; an exception travels as text: give ErrorText.of(error)"
    if issubclass(kind, torch.Tensor):
        return f"is a {name}; a plain tensor travels: give .detach().as_subclass(torch.Tensor)"
    for base in (*_PACKERS, np.ndarray):
        if issubclass(kind, base):
            return (
                f"is a {name}, which may not travel as a {base.__name__}; convert it, or register the class"
            )
    return (
        f"is a {name}, which may not travel; give plain values, arrays or tensors, "
        "or register its class if it is a dataclass, msgspec.Struct, NamedTuple or Enum"
    )
