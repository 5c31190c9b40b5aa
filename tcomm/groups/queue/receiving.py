"""The reader's side of a queue, wherever the writer is: chunks into messages."""

from __future__ import annotations

import functools
import threading

from tcomm.config import resolve_timeout
from tcomm.errors import DecodeError, UsageError
from tcomm.groups.queue.chunks import Assembler
from tcomm.groups.queue.patience import Patience
from tcomm.groups.queue.remote import RemoteReader
from tcomm.groups.queue.ring import PIECE_BYTES
from tcomm.groups.queue.ring_reader import RingReader, WithdrawnError
from tcomm.objects.codec import NOT_FLAT, decode, decode_flat, rehearse
from tcomm.objects.payload import Arrived

__all__ = ["Receiver"]


class _Call:
    """What the call at hand asked for; its patience is made when something has to be waited for."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self.begin(None, None, False)

    def begin(self, timeout: float | str | None, cancel: threading.Event | None, indefinite: bool) -> None:
        self._asked = (timeout, cancel, indefinite)
        self._made: Patience | None = None

    def patience(self) -> Patience:
        """One for all that the call waits for."""
        if self._made is None:
            timeout, cancel, indefinite = self._asked
            self._made = Patience(timeout, self._seconds, cancel, indefinite)
        return self._made


class Receiver:
    """Whole messages from the chunks of a source.

    Args:
        source: local or remote.
        seconds: to wait where a call says nothing; None: as long as the writer lives.

    Attributes:
        source: as given.
    """

    def __init__(self, source: RingReader | RemoteReader, seconds: float | None) -> None:
        self.source = source
        self._ring = source if isinstance(source, RingReader) else None
        self._assembler = Assembler()
        self._lent = -1
        self._call = _Call(seconds)
        # Nothing in it leads back here: a queue's memory is to go with its last reference.
        ring = self._ring
        self._wait_filled = None if ring is None else functools.partial(ring.wait_filled, self._call.patience)
        self._kept: tuple[object] | None = None
        self._was_long = False

    def next_value(
        self, timeout: float | str | None, cancel: threading.Event | None, indefinite: bool
    ) -> object:
        """The next object; raises as `next_message`, and DecodeError also when the message is none."""
        # The hot path of short messages: every line here is a hundredth of a round trip.
        if timeout is not None or self._lent >= 0:
            self._check(timeout)
        if (kept := self._kept) is not None:
            self._kept = None
            return kept[0]
        source, ring, in_slot, message = self.source, self._ring, True, None
        if ring is not None and not self._assembler.is_open:
            if self._was_long:
                self._rehearse(ring)
            message = ring.take()
        value = decode_flat(message) if message is not None and len(message) <= PIECE_BYTES else NOT_FLAT
        if value is NOT_FLAT:
            self._call.begin(timeout, cancel, indefinite)
            value, in_slot = self._next_other(message)
        taken = source.taken
        try:
            source.release()
            if not in_slot:
                self._assembler.drop()
        except BaseException:
            # A signal ended the call, and the message is no longer in the ring: the next call has it.
            self._kept = (value,) if source.taken != taken else None
            raise
        return value

    def _next_other(self, message: memoryview | None) -> tuple[object, bool]:
        """As `next_value`, of what is long, not flat, or (None) to come; and whether it lies in a slot."""
        in_slot = True
        if message is None:
            message, in_slot = self._await_message()
            if self._ring is not None and len(message) <= PIECE_BYTES:
                # Also what was waited for: most steps of an engine are further apart than a spin.
                value = decode_flat(message)
                if value is not NOT_FLAT:
                    return value, in_slot
        self._was_long = in_slot and len(message) > PIECE_BYTES
        return self._decode(message, in_slot)

    def _rehearse(self, ring: RingReader) -> None:
        """Where the next message is likely long and is not there yet, have at hand what reads one."""
        self._was_long = False
        if not ring.has_chunk():
            rehearse()

    def _decode(self, message: memoryview, in_slot: bool) -> tuple[object, bool]:
        """What a message is, or the next one where its writer gives it up, and whether that lay in a slot."""
        while True:
            arrived = self._wait_filled if in_slot and len(message) > PIECE_BYTES else None
            try:
                return decode(message, borrow=not in_slot, arrived=arrived), in_slot
            except WithdrawnError:
                self.source.release()
                message, in_slot = self._await_message()
            except DecodeError:
                self._assembler.drop()
                self.source.release()
                raise

    def next_borrowed(
        self, timeout: float | str | None, cancel: threading.Event | None, indefinite: bool
    ) -> tuple[object, bool]:
        """As `next_value`, without a copy, and whether it lies in a slot, which is then to be lent."""
        self._check(timeout)
        message, in_slot = memoryview(b""), False
        if self._kept is None:
            message, in_slot = self.next_whole(timeout, cancel, indefinite)
        if not in_slot:
            # Its last chunk is at hand, and what is made of it a view of this process's own memory.
            # It is no longer in the ring, and so the next call's until `lend`.
            value = self.next_value(timeout, cancel, indefinite)
            self._kept = (value,)
            return value, False
        try:
            return decode(message, borrow=True), True
        except DecodeError:
            self.source.release()
            raise

    def next_message(
        self, timeout: float | str | None, cancel: threading.Event | None, indefinite: bool
    ) -> tuple[memoryview, bool]:
        """A whole message, and whether it lies in a slot; the caller has to release its last chunk.

        A long one in a slot may still be coming. Half a message of several chunks that came before
        the deadline is kept for the next call.

        Raises:
            PeerTimeoutError, PeerLostError, GroupClosedError, CommError: when none comes.
            DecodeError: when a chunk is not what follows; its slot is released.
            ConfigError: when the timeout makes no sense, or a slot is lent.
        """
        self._begin(timeout, cancel, indefinite)
        return self._await_message()

    def _begin(self, timeout: float | str | None, cancel: threading.Event | None, indefinite: bool) -> None:
        self._check(timeout)
        self._call.begin(timeout, cancel, indefinite)

    def _await_message(self) -> tuple[memoryview, bool]:
        """As `next_message`, with what is left of the call's patience."""
        assembler, source = self._assembler, self.source
        while True:
            if not source.has_chunk():
                source.wait(self._call.patience())
            try:
                total, offset, chunk = source.look()
            except DecodeError:
                assembler.drop()
                source.release()
                raise
            if not offset and total == len(chunk):
                assembler.drop()
                return chunk, True
            try:
                message = assembler.add(total, offset, chunk)
            except DecodeError:
                source.release()
                raise
            # Only now: where a signal ends the call before, the next one gets this chunk again.
            if message is not None:
                return message, False
            source.release()

    def _arrived(self, message: memoryview) -> Arrived | None:
        """Waits for bytes of a message in a slot, with WithdrawnError too; None: all have come."""
        return self._wait_filled if len(message) > PIECE_BYTES else None

    def next_whole(
        self, timeout: float | str | None, cancel: threading.Event | None, indefinite: bool
    ) -> tuple[memoryview, bool]:
        """As `next_message`, when all of it has come."""
        message, in_slot = self.next_message(timeout, cancel, indefinite)
        while in_slot and not self._has_come(message):
            message, in_slot = self._await_message()
        return message, in_slot

    def _has_come(self, message: memoryview) -> bool:
        """Wait for all of a message in a slot; False, and it is released, when its writer gave it up."""
        arrived = self._arrived(message)
        try:
            if arrived is not None:
                arrived(len(message))
        except WithdrawnError:
            self.source.release()
            return False
        except DecodeError:
            self.source.release()
            raise
        return True

    def next_chunk(
        self, timeout: float | str | None, cancel: threading.Event | None, indefinite: bool
    ) -> memoryview:
        """The bytes of the next chunk, in a slot that is then to be lent. Raises as `next_message`."""
        self._begin(timeout, cancel, indefinite)
        while True:
            if not self.source.has_chunk():
                self.source.wait(self._call.patience())
            try:
                total, offset, chunk = self.source.look()
            except DecodeError:
                self.source.release()
                raise
            if offset or total != len(chunk) or self._has_come(chunk):
                return chunk

    def lend(self, in_slot: bool) -> None:
        """The caller has what was borrowed, and uses its slot until `take_back`, if it lies in one."""
        if not in_slot:
            self._kept = None
        self._lent = self.source.taken if in_slot else -1

    def take_back(self) -> None:
        """Release the slot that was lent, if one was. May be called again where a signal ended it."""
        if self._lent == self.source.taken:
            self.source.release()
        self._lent = -1

    def _check(self, timeout: float | str | None) -> None:
        """Refuse what makes no sense also where nothing has to be waited for."""
        if timeout is not None:
            resolve_timeout(timeout)
        if self._lent == self.source.taken:
            raise UsageError(
                "a message of this queue is borrowed; end the block of borrow or acquire_read before the next"
            )
