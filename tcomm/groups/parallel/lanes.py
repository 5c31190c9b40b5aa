"""Objects from rank to rank and from one to all, as messages of a communicator. Nothing is unpickled."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from tcomm.errors import DecodeError
from tcomm.groups.communicator import Communicator
from tcomm.groups.work import Work
from tcomm.objects.codec import Encoded, decode

__all__ = ["Handle", "Lanes", "SentMessage", "broadcast_message"]

_PREFIX = 64
"""Bytes before the message: its length, and zeros that keep arrays in it aligned."""
_HEAD = 1024
"""What travels first, prefix included: all of a short message."""
_MOST = 1 << 40


class Handle(Protocol):
    """Something under way."""

    def is_completed(self) -> bool:
        """Whether it has ended, well or badly."""
        ...

    def wait(self) -> object:
        """Wait for its end, as long as its own deadline allows. May be called again."""
        ...


class SentMessage:
    """The handle of a message that is being sent."""

    def __init__(self, works: list[Work]) -> None:
        self._works = works

    def is_completed(self) -> bool:
        """Whether the receiver has all of it, or it failed."""
        return all(work.is_completed() for work in self._works)

    def wait(self) -> None:
        """Wait until it has been sent. May be called again.

        Raises:
            PeerLostError, PeerTimeoutError: when the receiver is gone or does not receive.
        """
        for work in self._works:
            work.wait()


class Lanes:
    """Messages from one rank of a group to another, behind nothing but messages of their direction.

    A message to a higher rank and one to a lower rank travel in lanes of their own. So a rank that sends
    without waiting and then receives waits for its sender alone: in a chain of ranks somebody always
    receives.

    Args:
        communicator: whose ranks they are. **Collective**: it is split twice.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._rank = communicator.rank
        self._up = communicator.split("up")
        self._down = communicator.split("down")

    def send(self, message: Encoded, dst: int) -> None:
        """Send a message to `dst`; returns when it is on its way, or when `dst` takes it if it is long."""
        lane = self._towards(dst)
        for part in _parts_of(_framed(message)):
            lane.send(part, dst)

    def isend(self, message: Encoded, dst: int) -> SentMessage:
        """Send a message to `dst` behind the caller's back; it has been copied when this returns."""
        lane = self._towards(dst)
        return SentMessage([lane.send(part, dst, async_op=True) for part in _parts_of(_framed(message))])

    def recv(self, src: int) -> Any:
        """The next object from `src`. Its arrays and tensors are the receiver's own.

        Raises:
            DecodeError: when what came is no object. Later messages are unharmed.
        """
        lane = self._up if src < self._rank else self._down
        head = lane.recv(torch.empty(_HEAD, dtype=torch.uint8, device="cpu"), src)
        framed = _make_room(head)
        if framed is not head:
            lane.recv(framed[_HEAD:], src)
        return _decode(framed)

    def close(self) -> None:
        """Leave both lanes."""
        self._up.close()
        self._down.close()

    def _towards(self, dst: int) -> Communicator:
        return self._up if dst > self._rank else self._down


def broadcast_message(communicator: Communicator, message: Encoded | None, src: int) -> Any:
    """Give every rank the object of rank `src`, which alone has a message. **Collective.**

    Returns:
        The object; None on `src`.

    Raises:
        DecodeError: when what came is no object.
    """
    if message is not None:
        for part in _parts_of(_framed(message)):
            communicator.broadcast(part, src, out=part)
        return None
    head = torch.empty(_HEAD, dtype=torch.uint8, device="cpu")
    communicator.broadcast(head, src, out=head)
    framed = _make_room(head)
    if framed is not head:
        rest = framed[_HEAD:]
        communicator.broadcast(rest, src, out=rest)
    return _decode(framed)


def _framed(message: Encoded) -> torch.Tensor:
    """The message behind its length, and at least as long as a head."""
    framed = torch.empty(max(_HEAD, _PREFIX + message.nbytes), dtype=torch.uint8, device="cpu")
    view = framed.numpy().data
    view[:8] = message.nbytes.to_bytes(8, "little")
    message.write_into(view[_PREFIX:])
    return framed


def _parts_of(framed: torch.Tensor) -> list[torch.Tensor]:
    return [framed] if len(framed) == _HEAD else [framed[:_HEAD], framed[_HEAD:]]


def _make_room(head: torch.Tensor) -> torch.Tensor:
    """The head itself, or where it is not all, a tensor for the whole that begins with it."""
    nbytes = _length(head)
    if nbytes > _MOST:
        raise DecodeError(f"a message says that it has {nbytes} bytes; at most {_MOST} are possible")
    if _PREFIX + nbytes <= _HEAD:
        return head
    framed = torch.empty(_PREFIX + nbytes, dtype=torch.uint8, device="cpu")
    framed[:_HEAD] = head
    return framed


def _length(framed: torch.Tensor) -> int:
    return int.from_bytes(framed.numpy().data[:8], "little")


def _decode(framed: torch.Tensor) -> Any:
    # Nobody else has this memory: what is decoded may stay in it.
    return decode(framed.numpy().data[_PREFIX : _PREFIX + _length(framed)], borrow=True)
