"""Agreeing on a call before it takes effect, with shared memory and without."""

from __future__ import annotations

from typing import Protocol

from tcomm.errors import CollectiveMismatchError
from tcomm.groups.fallback import TorchFallback
from tcomm.memory.channel import Channel
from tcomm.memory.control import Word
from tcomm.signature import CallDescription, decode_description

__all__ = ["Agreement", "LocalAgreement", "RemoteAgreement", "SharedAgreement"]

_DESCRIPTION_BYTES = 1024


class Agreement(Protocol):
    """Compares what the ranks call."""

    @property
    def seq(self) -> int:
        """Number of the last call."""
        ...

    def agree(self, call: CallDescription, timeout: float | None) -> list[CallDescription]:
        """Return every rank's description, once all are known to agree. **Collective.**

        Raises:
            CollectiveMismatchError: on every rank, when signatures differ.
            PeerLostError, PeerTimeoutError: when a rank did not come.
        """
        ...


class LocalAgreement:
    """A world of one agrees with itself."""

    seq = 0

    def agree(self, call: CallDescription, timeout: float | None) -> list[CallDescription]:
        """Return `[call]`."""
        del timeout
        return [call]


class SharedAgreement:
    """One epoch of the group's channel, without data."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    @property
    def seq(self) -> int:
        """Number of the last call."""
        return self._channel.words[Word.EPOCH]

    def agree(self, call: CallDescription, timeout: float | None) -> list[CallDescription]:
        """Compare arrival words; read the peers' descriptions where they lie. **Collective.**"""
        channel = self._channel
        epoch = channel.agree(call, timeout)
        described = [page.description(epoch & 1) for page in channel.pages]
        return [call if theirs is None else theirs for theirs in described]


class RemoteAgreement:
    """An all-gather of signatures, for ranks that share no memory."""

    def __init__(self, group: str, fallback: TorchFallback) -> None:
        self._group = group
        self._fallback = fallback
        self.seq = 0

    def agree(self, call: CallDescription, timeout: float | None) -> list[CallDescription]:
        """Gather descriptions, at a round trip's cost. **Collective.**"""
        self.seq += 1
        gathered = self._fallback.gather_bytes(call.encode(), _DESCRIPTION_BYTES, timeout)
        calls = [decode_description(data) for data in gathered]
        others = [r for r, c in enumerate(calls) if c is None or c.signature != call.signature]
        if others:
            lines = [f"call #{self.seq} of group {self._group!r}: the ranks called different things"]
            lines += [f"  rank {r}: {c or 'an unreadable call'}" for r, c in enumerate(calls)]
            lines.append("make the ranks call the same thing; the group stays usable")
            raise CollectiveMismatchError(
                "\n".join(lines),
                group=self._group,
                op=call.op,
                seq=self.seq,
                rank=self._fallback.rank,
                peers=others,
            )
        return [c for c in calls if c is not None]
