"""The receiver's side of the codec: values from a structure that nobody vouches for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import msgspec
import torch

from tcomm.errors import CommError, DecodeError
from tcomm.objects.arrays import TORCH_DTYPES, make_array, make_number, make_tensor
from tcomm.objects.handlers import is_from_handler
from tcomm.objects.layout import SCALARS, Tag, align, is_plain
from tcomm.objects.payload import Arrived, Payload
from tcomm.objects.registry import registered_named

__all__ = ["Unpacker", "decode_own", "decode_plain"]

decode_plain = msgspec.msgpack.Decoder().decode
"""Msgpack as values; whatever it raises, the bytes are wrong."""


def _refuse_extension(code: int, _data: memoryview) -> NoReturn:
    raise DecodeError(f"extension {code} of msgpack may not travel")


decode_own = msgspec.msgpack.Decoder(ext_hook=_refuse_extension).decode
"""As `decode_plain`, of bytes that `encode_plain` made; what it never makes is refused where that is free."""


class Unpacker:
    """One message being read.

    Args:
        data: the whole message.
        offset: where the structure ends.
        sizes: bytes of each buffer.
        borrow: whether arrays and tensors are views of `data`.
        max_depth: containers that may lie in one another.
        device: where tensors that lay on a device of its type go; None: all to the CPU.
        arrived: for a message that is still coming; None: it is all there.

    Raises:
        DecodeError: when the buffers are not exactly what follows the structure.
    """

    def __init__(
        self,
        data: memoryview,
        offset: int,
        sizes: Sequence[object],
        *,
        borrow: bool,
        max_depth: int,
        device: torch.device | None,
        arrived: Arrived | None = None,
    ) -> None:
        self._borrow = borrow
        self._depth = max_depth
        self._device = device
        self._payloads = []
        for size in sizes:
            if type(size) is not int or size < 0:
                raise DecodeError("a buffer of the message has no possible size")
            offset = align(offset)
            self._payloads.append(Payload(data, offset, offset + size, arrived))
            offset += size
        if offset != len(data):
            raise DecodeError(f"the message says that it has {offset} bytes, and has {len(data)}")
        # From the end: each is used once, in order, or few bytes could ask for much memory.
        self._payloads.reverse()

    def finish(self, structure: object) -> object:
        """The value of a whole structure.

        Raises:
            DecodeError: when it is not one, or leaves a buffer over. Other errors mean the same.
        """
        value = self._unpack(structure)
        if self._payloads:
            raise DecodeError(f"{len(self._payloads)} buffers of the message belong to nothing")
        return value

    def _unpack(self, node: Any) -> Any:
        kind = type(node)
        if kind is list:
            return _UNPACKERS[node[0]](self, *node[1:])
        if kind in SCALARS or kind is bytes:
            return node
        raise DecodeError(f"a {kind.__name__} stands where none may")

    def _enter(self) -> None:
        if not self._depth:
            raise DecodeError("the message is deeper than max_depth allows")
        self._depth -= 1

    def _all(self, nodes: tuple[Any, ...]) -> list[Any]:
        self._enter()
        values = [node if type(node) in SCALARS else self._unpack(node) for node in nodes]
        self._depth += 1
        return values

    def _plain(self, value: object) -> object:
        if not is_plain(value, self._depth):
            raise DecodeError("the message is deeper than max_depth allows, or what should be plain is not")
        return value

    def _list(self, *nodes: Any) -> list[Any]:
        return self._all(nodes)

    def _tuple(self, *nodes: Any) -> tuple[Any, ...]:
        return tuple(self._all(nodes))

    def _dict(self, *nodes: Any) -> dict[Any, Any]:
        # As little as possible is done behind the last buffer: a reader waits for each step of it.
        self._enter()
        unpack, made = self._unpack, {}
        for name, node in zip(nodes[::2], nodes[1::2], strict=True):
            # First, as it stands first: it may be of a buffer, too.
            key = name if type(name) in SCALARS else unpack(name)
            made[key] = node if type(node) in SCALARS else unpack(node)
        if len(made) * 2 != len(nodes):
            raise DecodeError("a dict has a key twice")
        self._depth += 1
        return made

    def _set(self, *nodes: Any) -> set[Any]:
        return set(self._elements(nodes))

    def _frozenset(self, *nodes: Any) -> frozenset[Any]:
        return frozenset(self._elements(nodes))

    def _elements(self, nodes: tuple[Any, ...]) -> list[Any]:
        values = self._all(nodes)
        if len(set(values)) != len(values):
            raise DecodeError("a set has an element twice")
        return values

    def _int(self, digits: bytes) -> int:
        return int.from_bytes(digits, "little", signed=True)

    def _str(self, text: bytes) -> str:
        return text.decode(errors="surrogatepass")

    def _bytes(self) -> bytes:
        return self._payloads.pop().to_bytes()

    def _bytearray(self) -> bytearray:
        payload = self._payloads.pop()
        made = bytearray(len(payload))
        payload.copy_into(memoryview(made))
        return made

    def _array(self, name: str, shape: Sequence[object]) -> Any:
        return make_array(name, shape, self._payloads.pop(), self._borrow)

    def _number(self, name: str, payload: bytes) -> Any:
        return make_number(name, payload)

    def _tensor(self, name: str, device_type: str, shape: Sequence[object]) -> torch.Tensor:
        tensor = make_tensor(name, shape, self._payloads.pop(), self._borrow)
        if self._device is not None and self._device.type == device_type:
            return tensor.to(self._device)
        return tensor

    def _dtype(self, name: str) -> torch.dtype:
        return TORCH_DTYPES[name]

    def _torch_device(self, kind: str, index: int | None) -> torch.device:
        device = torch.device(kind) if index is None else torch.device(kind, index)
        if device.index != index:
            raise DecodeError(f"a device {kind} has no index {index}")
        return device

    def _size(self, *sizes: int) -> torch.Size:
        return torch.Size(sizes)

    def _registered(self, name: str, fingerprint: int, *nodes: Any) -> object:
        entry = registered_named(name, fingerprint)
        if len(nodes) != len(entry.fields):
            raise DecodeError(f"a {name} came with {len(nodes)} fields and has {len(entry.fields)}")
        values = self._all(nodes)
        try:
            return entry.make(*values)
        except CommError as error:
            if is_from_handler(error):
                raise
            # Not to be taken for one of the wait for the message.
            raise DecodeError(f"a {name} cannot be made: {type(error).__name__}: {error}") from error


_UNPACKERS: dict[int, Callable[..., Any]] = {
    Tag.PLAIN: Unpacker._plain,
    Tag.LIST: Unpacker._list,
    Tag.TUPLE: Unpacker._tuple,
    Tag.DICT: Unpacker._dict,
    Tag.SET: Unpacker._set,
    Tag.FROZENSET: Unpacker._frozenset,
    Tag.INT: Unpacker._int,
    Tag.STR: Unpacker._str,
    Tag.BYTES: Unpacker._bytes,
    Tag.BYTEARRAY: Unpacker._bytearray,
    Tag.ARRAY: Unpacker._array,
    Tag.NUMBER: Unpacker._number,
    Tag.TENSOR: Unpacker._tensor,
    Tag.DTYPE: Unpacker._dtype,
    Tag.DEVICE: Unpacker._torch_device,
    Tag.SIZE: Unpacker._size,
    Tag.REGISTERED: Unpacker._registered,
}
_UNPACKERS = {int(tag): unpack for tag, unpack in _UNPACKERS.items()}
