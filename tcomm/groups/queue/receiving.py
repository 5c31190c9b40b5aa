"""The reader's side of a queue, wherever the writer is: chunks into messages."""

from __future__ import annotations

import threading

from tcomm.config import resolve_timeout
from tcomm.errors import DecodeError, UsageError
from tcomm.groups.queue.chunks import Assembler
from tcomm.groups.queue.local import RingReader
from tcomm.groups.queue.patience import Patience
from tcomm.groups.queue.remote import RemoteReader

__all__ = ["Receiver"]


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
        self._seconds = seconds
        self._assembler = Assembler()
        self._is_lent = False

    def next_message(
        self, timeout: float | str | None, cancel: threading.Event | None, indefinite: bool
    ) -> tuple[memoryview, bool]:
        """A whole message, and whether it lies in a slot that the caller has to release.

        Half a message that came before the deadline is kept for the next call.

        Raises:
            PeerTimeoutError, PeerLostError, GroupClosedError, CommError: when none comes.
            DecodeError: when a chunk is not what follows; its slot is released.
            ConfigError: when the timeout makes no sense, or a slot is lent.
        """
        self._check(timeout)
        assembler = self._assembler
        if self._ring is not None and not assembler.is_open:
            whole = self._ring.take()
            if whole is not None:
                return whole, True
        source, patience = self.source, None
        while True:
            if not source.has_chunk():
                patience = patience or Patience(timeout, self._seconds, cancel, indefinite)
                source.wait(patience)
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
            source.release()
            if message is not None:
                assembler.drop()
                return message, False

    def next_chunk(
        self, timeout: float | str | None, cancel: threading.Event | None, indefinite: bool
    ) -> memoryview:
        """The bytes of the next chunk, in a slot that is lent until `take_back`. Raises as `next_message`."""
        self._check(timeout)
        if not self.source.has_chunk():
            self.source.wait(Patience(timeout, self._seconds, cancel, indefinite))
        try:
            chunk = self.source.look()[2]
        except DecodeError:
            self.source.release()
            raise
        self.lend(True)
        return chunk

    def lend(self, in_slot: bool) -> None:
        """The caller uses the slot of the message until `take_back`, if the message lies in one."""
        self._is_lent = in_slot

    def take_back(self) -> None:
        """Release the slot that was lent, if one was."""
        if self._is_lent:
            self._is_lent = False
            self.source.release()

    def _check(self, timeout: float | str | None) -> None:
        """Refuse what makes no sense also where nothing has to be waited for."""
        if timeout is not None:
            resolve_timeout(timeout)
        if self._is_lent:
            raise UsageError(
                "a message of this queue is borrowed; end the block of borrow or acquire_read before the next"
            )
