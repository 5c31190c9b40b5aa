"""Objects as bytes and back, over a closed set of types. Nothing that is received is ever executed.

`docs/objects.md` says what may travel and how it is laid out.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec
import torch

from tcomm.errors import CommError, ConfigError, DecodeError
from tcomm.objects.handlers import is_from_handler
from tcomm.objects.layout import HEAD, MARK, SCALARS, VERSION, Form, align, is_plain
from tcomm.objects.marked import decode_marked, encode_marked, mark
from tcomm.objects.packing import Packer, encode_plain
from tcomm.objects.payload import Arrived
from tcomm.objects.registry import ErrorText, register
from tcomm.objects.unpacking import Unpacker, decode_own, decode_plain

__all__ = [
    "MAX_DEPTH",
    "MAX_NBYTES",
    "NOT_FLAT",
    "Encoded",
    "ErrorText",
    "decode",
    "decode_flat",
    "encode",
    "encode_flat",
    "encode_tagged",
    "register",
    "rehearse",
]

MAX_NBYTES = 1 << 32
"""Bytes that a message may have unless the caller says otherwise."""
MAX_DEPTH = 64
"""Containers that may lie in one another unless the caller says otherwise."""
NOT_FLAT: Final = object()
"""What `decode_flat` makes of all other messages."""
_TOO_LONG = "all but arrays, tensors and bytes may have 4 GiB in a message: {}"
_TAGGED, _MARKED = int(Form.TAGGED), int(Form.MARKED)
_NOT_MSGPACK = (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError)


class Encoded:
    """A message in parts, of which the large ones are views of the arrays and tensors that were given.

    They may not change until the message is written.

    Attributes:
        parts: bytes-like objects of unsigned bytes; put together they are the message.
        nbytes: of all parts.
    """

    __slots__ = ("nbytes", "parts")

    def __init__(self, parts: list[bytes | memoryview], nbytes: int) -> None:
        self.parts = parts
        self.nbytes = nbytes

    def join(self) -> bytes:
        """The message in one piece."""
        return b"".join(self.parts)

    def write_into(self, target: memoryview) -> None:
        """Write the message to the beginning of `target`, which holds unsigned bytes.

        Raises:
            ConfigError: when it is too small.
        """
        if target.nbytes < self.nbytes:
            raise ConfigError(f"the message has {self.nbytes} bytes, and {target.nbytes} were given for it")
        begin = 0
        for part in self.parts:
            end = begin + len(part)
            target[begin:end] = part
            begin = end


def encode(value: object, *, max_nbytes: int = MAX_NBYTES, max_depth: int = MAX_DEPTH) -> Encoded:
    """`value` as a message. Large arrays, tensors and bytes are not copied.

    Args:
        value: of the types in `docs/objects.md`, exactly: a subclass travels only where it is registered.
        max_nbytes: bytes that the message may have.
        max_depth: containers that may lie in one another.

    Raises:
        ConfigError: when something in `value` may not travel, with the path to it, or a cap is passed.
    """
    body = encode_flat(value, max_depth)
    if body is None:
        return encode_tagged(value, max_nbytes=max_nbytes, max_depth=max_depth)
    return _capped(Encoded([body], len(body)), max_nbytes)


def encode_tagged(value: object, *, max_nbytes: int = MAX_NBYTES, max_depth: int = MAX_DEPTH) -> Encoded:
    """As `encode`, of a value for which `encode_flat` has answered None."""
    try:
        encoded = _encode_structure(value, max_depth)
    except RecursionError:
        raise ConfigError(f"the value is deeper than Python's stack allows; max_depth={max_depth}") from None
    return _capped(encoded, max_nbytes)


def _capped(encoded: Encoded, max_nbytes: int) -> Encoded:
    if encoded.nbytes > max_nbytes:
        raise ConfigError(
            f"the message has {encoded.nbytes} bytes, more than max_nbytes={max_nbytes}; "
            "send it in parts, or give both sides a larger max_nbytes"
        )
    return encoded


def encode_flat(value: object, max_depth: int = MAX_DEPTH) -> bytes | None:
    """The message of what msgpack alone gives back, of any length; None where only `encode` can tell.

    Args:
        value: of any type.
        max_depth: containers that may lie in one another.
    """
    try:
        if type(value) in SCALARS or is_plain(value, max_depth):
            return encode_plain(value)
    except (OverflowError, UnicodeEncodeError, RecursionError) as error:
        if is_from_handler(error):
            raise
    return None


def decode_flat(message: memoryview) -> object:
    """The value of a message of `encode_flat`, whose writer is this library, run by this user.

    The bytes are checked, but not again that the value is one that may travel.

    Args:
        message: unsigned bytes, all there.

    Returns:
        The value, or `NOT_FLAT` where only `decode` can tell what it is, or what is wrong with it.
    """
    try:
        return decode_own(message)
    except _NOT_MSGPACK as error:
        # Raised in a frame of its own, by a signal's handler that ran here, it is not to be lost.
        if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
            raise
        return NOT_FLAT
    except DecodeError:
        return NOT_FLAT


def rehearse() -> None:
    """Decode a small message that is laid out as long ones are.

    What reads these is then in the processor's caches, for whoever has the time before the next one comes.
    """
    decode(_SAMPLE, arrived=_all_of_sample)


def _all_of_sample(_: int) -> int:
    return len(_SAMPLE)


def _encode_structure(value: object, max_depth: int) -> Encoded:
    marked = encode_marked(value, max_depth)
    form = _TAGGED if marked is None else _MARKED
    structure, buffers = _encode_with_tags(value, max_depth) if marked is None else marked
    return _put_together(form, structure, buffers)


def _put_together(form: int, structure: bytes, buffers: list[memoryview]) -> Encoded:
    try:
        head = HEAD.pack(MARK, VERSION, form, len(structure)) + structure
    except struct.error as error:
        raise ConfigError(_TOO_LONG.format(error)) from error
    if buffers:
        # A part less to give out, and what follows begins at a multiple of 64 bytes.
        head = head.ljust(align(len(head)), b"\0")
    parts: list[bytes | memoryview] = [head]
    end = len(head)
    for buffer in buffers:
        begin = align(end)
        if begin > end:
            parts.append(bytes(begin - end))
        if len(buffer):
            parts.append(buffer)
        end = begin + len(buffer)
    return Encoded(parts, end)


_SAMPLE: Final = _put_together(_MARKED, encode_plain({"": mark(1)}), [memoryview(b"1")]).join()


def _encode_with_tags(value: object, max_depth: int) -> tuple[bytes, list[memoryview]]:
    packer = Packer(max_depth)
    tree = packer.pack_tagged(value)
    try:
        return encode_plain([list(map(len, packer.buffers)), tree]), packer.buffers
    except (ValueError, OverflowError) as error:
        if is_from_handler(error):
            raise
        raise ConfigError(_TOO_LONG.format(error)) from error


def decode(
    data: bytes | bytearray | memoryview,
    *,
    borrow: bool = False,
    max_nbytes: int = MAX_NBYTES,
    max_depth: int = MAX_DEPTH,
    device: torch.device | None = None,
    arrived: Arrived | None = None,
) -> object:
    """The value of a message, with the types that it had.

    Memory that this takes is at most a fixed multiple of the message's.

    Args:
        data: a whole message; a memoryview holds unsigned bytes.
        borrow: whether arrays and tensors are views of `data`, which must be writable since torch has no
            read-only tensors. Aligned to 64 bytes where `data` is.
        max_nbytes: bytes that the message may have.
        max_depth: containers that may lie in one another.
        device: where tensors go that lay on a device of its type; None: every tensor arrives on the CPU.
        arrived: for a message that is still being written into `data`: waits until so many of its bytes are
            there and returns how many are; large buffers are copied as they come. None: all are there.

    Raises:
        CommError: what `arrived` raises. What a signal's handler raises meanwhile comes out as it is.
        DecodeError: when the bytes are not a message, a cap is passed, or a class is not registered here.
        ConfigError: when read-only bytes are to be borrowed.
    """
    if len(data) > max_nbytes:
        raise DecodeError(f"a message of {len(data)} bytes is longer than max_nbytes={max_nbytes}")
    if borrow and memoryview(data).readonly:
        raise ConfigError(
            "borrow=True needs writable memory, as torch has no read-only tensors; leave it out"
        )
    try:
        there = len(data) if arrived is None else arrived(min(HEAD.size, len(data)))
        if len(data) and data[0] == MARK:
            return _decode_structure(memoryview(data), there, borrow, max_depth, device, arrived)
        if arrived is not None:
            arrived(len(data))
        value = decode_plain(data)
        if type(value) in SCALARS or is_plain(value, max_depth):
            return value
    except CommError:
        raise
    except Exception as error:
        if is_from_handler(error):
            raise
        raise DecodeError(f"the bytes are no message: {type(error).__name__}: {error}") from error
    raise DecodeError("the bytes are no message: too deep, or of a type that may not travel")


def _decode_structure(
    data: memoryview,
    there: int,
    borrow: bool,
    max_depth: int,
    device: torch.device | None,
    arrived: Arrived | None,
) -> object:
    _, version, form, nbytes = HEAD.unpack_from(data)
    if version != VERSION or form > _MARKED:
        raise DecodeError(f"a message of version {version} and form {form}; here it is {VERSION}, 0 or 1")
    end = HEAD.size + nbytes
    if arrived is not None and there < end:
        arrived(min(end, len(data)))
    if form == _MARKED:
        value = decode_marked(data, end, max_depth, arrived)
    else:
        sizes, tree = decode_plain(data[HEAD.size : end])
        unpacker = Unpacker(
            data, end, sizes, borrow=borrow, max_depth=max_depth, device=device, arrived=arrived
        )
        value = unpacker.finish(tree)
    if arrived is not None:
        # Also what belongs to no buffer: until the last byte is there, the message may be given up.
        arrived(len(data))
    return value
