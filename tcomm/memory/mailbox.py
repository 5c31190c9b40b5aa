"""The host's side of send and recv: mailboxes, message headers, and bounded waits for one peer.

`docs/memory-model.md`, section 9, is the contract. Neither epochs nor arrival words are touched here.
"""

from __future__ import annotations

import dataclasses
import os
import struct
import time
from collections.abc import Sequence
from typing import NoReturn

from tcomm.errors import CollectiveMismatchError, CommError, PeerLostError, PeerTimeoutError
from tcomm.memory.base import SymmetricBuffer
from tcomm.memory.channel import Channel
from tcomm.memory.control import (
    HEADS,
    MAILBOX_LINE,
    MAILBOX_SLOTS,
    RECEIVED,
    RECEIVING_BLOCKS,
    SENDING_BLOCKS,
    SENT,
    TAILS,
    ErrorKind,
    PoisonCode,
    Word,
)
from tcomm.memory.wait import LOOKS_PER_LIVENESS_CHECK, pause_since
from tcomm.signature import CallDescription, decode_description

__all__ = ["HEADER_BYTES", "MailboxLayout", "Mailboxes", "Message", "PairWait"]

HEADER_BYTES = 1024
"""In front of each slot; torch's limit of 64 dimensions fits."""
_HEADER = struct.Struct("<QQQ")
_PAGE_BYTES = 4096
_PAYLOAD_BYTES = 64 * 1024
_YIELDS = 64
_POISON, _LEFT = int(Word.POISON_CODE), int(Word.LEFT)  # members of an enum cost a tenth of a microsecond


@dataclasses.dataclass(frozen=True)
class MailboxLayout:
    """Where the slots of every source lie in a rank's buffer. A pure function of the world's size."""

    world_size: int

    @property
    def slot_bytes(self) -> int:
        """Payload of a slot: smaller in larger worlds, so that a rank's buffer stays as small."""
        return max(_PAYLOAD_BYTES // self.world_size // _PAGE_BYTES, 1) * _PAGE_BYTES

    @property
    def stride(self) -> int:
        """From one slot to the next."""
        return HEADER_BYTES + self.slot_bytes

    @property
    def nbytes(self) -> int:
        """Of one rank's buffer."""
        return self.offset(self.world_size, 0)

    def offset(self, source: int, slot: int) -> int:
        """Where the header of a slot begins; the payload follows it."""
        return (source * MAILBOX_SLOTS + slot) * self.stride


class Message:
    """A kind of message: what its header says."""

    def __init__(self, dtype: str, shape: Sequence[int], nbytes: int) -> None:
        self.nbytes = nbytes
        call = CallDescription("message", dtype, tuple(shape))
        self.signature = call.signature
        described = call.encode()
        self.header = _HEADER.pack(self.signature, nbytes, len(described)) + described
        self.told = _told(call)


def _told(call: CallDescription) -> str:
    return str(call).removeprefix(f"{call.op} ")


class PairWait:
    """The waits of this rank for one peer in one direction, by whichever engine.

    Args:
        channel: of the group.
        spins: polls before a wait begins to yield.
        op: `send`, which waits for credits, or `recv`, which waits for filled slots.
        peer: who gives them.
    """

    axis_rank = 0

    def __init__(self, channel: Channel, spins: int, op: str, peer: int) -> None:
        self.peer = peer
        self._channel = channel
        self._words = channel.words
        self._spins = spins
        self._call = CallDescription(op)
        self._is_send = op == "send"
        self._credits = MAILBOX_SLOTS if self._is_send else 0
        self._index = (TAILS if self._is_send else HEADS) + peer * MAILBOX_LINE
        self._own = (SENT if self._is_send else RECEIVED) + peer
        self._blocks = (SENDING_BLOCKS if self._is_send else RECEIVING_BLOCKS) + peer * MAILBOX_SLOTS
        self._timeout: float | None = None
        self._began = 0.0
        self._looks = 0
        self._first = 0
        self._failure: CommError | None = None

    def begin(self, timeout: float | None) -> int:
        """Start a call; the slots that went between the two before it.

        Raises:
            PeerLostError, PeerTimeoutError: when the group was given up, or `send` has nobody to send to.
        """
        words = self._words
        if words[_POISON]:
            self._raise_poison()
        if self._is_send and self._channel.pages[self.peer].words[_LEFT]:
            self._lose()
        self._timeout = timeout
        self._began = 0.0
        count = words[self._own]
        self._first = count + 1
        return count

    def until(self, wanted: int) -> None:
        """Wait until slot `wanted - 1` of this pair may be filled, or is.

        Raises:
            PeerLostError: the peer died or left, or the group was given up.
            PeerTimeoutError: the deadline of the call has passed.
        """
        words, index, least = self._words, self._index, wanted - self._credits
        polls = self._spins
        while words[index] < least:
            polls -= 1
            if polls < -_YIELDS:
                self._wait_long(wanted)
                return
            if polls < 0:
                os.sched_yield()
        if polls < 0:
            self._channel.make_room()
        else:
            self._channel.waits_with_yields = 0

    def _wait_long(self, wanted: int) -> None:
        try:
            while not self.step(wanted):
                pause_since(self._began)
        finally:
            self._words[Word.WAITING_FOR] = 0

    def step(self, wanted: int) -> bool:
        """Look once; True when `wanted` is there. Raises as `until` does."""
        words = self._words
        if self._is_there(wanted):
            return True
        if words[Word.POISON_CODE]:
            self._raise_poison()
        if not self._began:
            self._began, self._looks = time.monotonic(), 0
        if self._looks % LOOKS_PER_LIVENESS_CHECK == 0:
            words[Word.SEQ] = words[Word.EPOCH]
            words[Word.WAITING_FOR] = self.peer + 1
            words[Word.LAST_PROGRESS_NS] = int(self._began * 1e9)
            # What a peer sent before it died counts.
            if self._channel.is_gone(self.peer) and not self._is_there(wanted):
                self._lose()
            if self._is_late() and not self._is_there(wanted):
                self._time_out(wanted > self._first)
        self._looks += 1
        return False

    def _is_there(self, wanted: int) -> bool:
        return self._words[self._index] + self._credits >= wanted

    def _is_late(self) -> bool:
        return self._timeout is not None and time.monotonic() >= self._began + self._timeout

    # Kernels -------------------------------------------------------------------------------------

    def kernel_pause(self, phase: int, block: int, word: int) -> int:
        """Called by an interpreted kernel between two polls: 0 to go on, 1 to stop waiting."""
        del phase, block
        try:
            if not self.step(word):
                pause_since(self._began)
        except CommError as failure:
            self._failure = failure
            return 1
        return 0

    def after_kernel(self) -> bool:
        """Raise what a kernel found while it waited; False where it found another message than asked for."""
        words = self._words
        failure, self._failure = self._failure, None
        words[Word.WAITING_FOR] = 0
        kind = words[Word.ERROR_KIND]
        words[Word.ERROR_KIND] = ErrorKind.NONE
        if kind == ErrorKind.TIMEOUT:
            if failure is not None:
                raise failure
            self._time_out(self._has_moved())
        return kind != ErrorKind.MISMATCH

    def _has_moved(self) -> bool:
        """Whether a kernel that gave up had begun with its message."""
        rank = self._channel.rank
        theirs = (HEADS if self._is_send else TAILS) + rank * MAILBOX_LINE
        published = self._channel.pages[self.peer].words[theirs] != self._words[self._own]
        return published or any(self._words[self._blocks + slot] for slot in range(MAILBOX_SLOTS))

    # Errors --------------------------------------------------------------------------------------

    @property
    def what(self) -> str:
        """The call in words."""
        way = "to" if self._is_send else "from"
        return f"{self._call.op} {way} rank {self.peer} of group {self._channel.group!r}"

    def error(self, kind: type[CommError], message: str) -> CommError:
        """An error of this call with its fields filled in."""
        return kind(
            message,
            group=self._channel.group,
            op=self._call.op,
            seq=self._words[Word.EPOCH],
            rank=self._channel.rank,
            peers=[self.peer],
        )

    def _raise_poison(self) -> NoReturn:
        self._channel.name_call(self._call)
        self._channel.raise_poison()

    def _lose(self) -> NoReturn:
        channel = self._channel
        channel.give_up(PoisonCode.PEER_LOST, self.peer, self._words[Word.EPOCH])
        raise self.error(PeerLostError, f"{self.what} cannot complete: {channel.blame(self.peer)}")

    def _time_out(self, has_moved: bool) -> NoReturn:
        channel = self._channel
        seconds = "" if self._timeout is None else f" after {self._timeout:g} s"
        after = f"timed out{seconds} on rank {channel.rank}"
        advice = "find out what it does, or call with a longer timeout="
        blame = channel.blame(self.peer)
        if not has_moved:
            remedy = f"nothing of the message has moved, so the group stays usable; {advice}"
            raise self.error(PeerTimeoutError, f"{self.what} {after}: {blame}; {remedy}")
        channel.give_up(PoisonCode.PEER_TIMEOUT, self.peer, self._words[Word.EPOCH])
        told = f"{self.what} {after} in the middle of a message: {blame}; {advice}"
        raise self.error(PeerTimeoutError, told)


class Mailboxes:
    """The mailboxes of all pairs of a group. Used by one thread at a time.

    Args:
        channel: of the group.
        buffer: of `layout.nbytes` a rank, zeroed.
        spins: polls before a wait begins to yield.
    """

    def __init__(self, channel: Channel, buffer: SymmetricBuffer, spins: int) -> None:
        self.channel = channel
        self.buffer = buffer
        self.layout = MailboxLayout(channel.world_size)
        self._spins = spins
        self._waits: dict[tuple[str, int], PairWait] = {}

    def wait_of(self, op: str, peer: int) -> PairWait:
        """The waits of `send` to, or `recv` from, a peer."""
        if (op, peer) not in self._waits:
            self._waits[op, peer] = PairWait(self.channel, self._spins, op, peer)
        return self._waits[op, peer]

    def headers(self, receiver: int, source: int) -> tuple[memoryview[int], ...]:
        """Bytes of the header of each slot of a pair."""
        data = self.buffer.peer(receiver).numpy().data
        offsets = [self.layout.offset(source, slot) for slot in range(MAILBOX_SLOTS)]
        return tuple(data[offset : offset + HEADER_BYTES] for offset in offsets)

    def payload_addresses(self, receiver: int, source: int) -> tuple[int, ...]:
        """Address of the payload of each slot of a pair, in this process."""
        base = self.buffer.peer(receiver).data_ptr() + HEADER_BYTES
        return tuple(base + self.layout.offset(source, slot) for slot in range(MAILBOX_SLOTS))

    def mismatch(self, source: int, asked: Message) -> CommError:
        """The error for a message that is not what recv asked for; it stays where it is."""
        wait = self.wait_of("recv", source)
        rank = self.channel.rank
        slot = self.channel.words[RECEIVED + source] % MAILBOX_SLOTS
        header = self.headers(rank, source)[slot]
        _, nbytes, length = _HEADER.unpack_from(header)
        described = bytes(header[_HEADER.size : _HEADER.size + min(length, HEADER_BYTES - _HEADER.size)])
        sent = decode_description(described)
        told = f"{_told(sent) if sent else 'an unreadable message'} ({nbytes} bytes)"
        lines = (
            f"{wait.what}: the next message is another than was asked for",
            f"  rank {source} sent: {told}",
            f"  rank {rank} asked for: {asked.told} ({asked.nbytes} bytes)",
            "the message stays; receive it into a tensor like it; the group stays usable",
        )
        return wait.error(CollectiveMismatchError, "\n".join(lines))
