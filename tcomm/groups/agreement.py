"""Agreeing on a call before it takes effect, with shared memory and without."""

from __future__ import annotations

from typing import Protocol

import msgspec

from tcomm.errors import CapabilityError, CollectiveMismatchError
from tcomm.groups.fallback import TorchFallback
from tcomm.memory.channel import Channel
from tcomm.memory.control import Word
from tcomm.signature import CallDescription, decode_description

__all__ = ["Agreement", "LocalAgreement", "RemoteAgreement", "SharedAgreement"]

_DESCRIPTION_BYTES = 1024
_SIGNATURE_BYTES = 4


class Agreement(Protocol):
    """Compares what the ranks call."""

    @property
    def seq(self) -> int:
        """Number of the last call."""
        ...

    def agree(self, call: CallDescription, timeout: float | None) -> list[CallDescription]:
        """Return every rank's description, once all are known to agree. **Collective.**

        Raises:
            CapabilityError: on every rank, when one has more splits than a description holds.
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
        return _readable(call, described)


class RemoteAgreement:
    """An all-gather of signatures, for ranks that share no memory."""

    def __init__(self, group: str, fallback: TorchFallback) -> None:
        self._group = group
        self._fallback = fallback
        self.seq = 0

    def agree(self, call: CallDescription, timeout: float | None) -> list[CallDescription]:
        """Gather descriptions, at a round trip's cost. **Collective.**"""
        self.seq += 1
        mine = call.signature.to_bytes(_SIGNATURE_BYTES, "little")
        gathered = self._fallback.gather_bytes(mine + _brief(call), _DESCRIPTION_BYTES, timeout)
        calls = [decode_description(data[_SIGNATURE_BYTES:]) for data in gathered]
        others = [rank for rank, data in enumerate(gathered) if data[:_SIGNATURE_BYTES] != mine]
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
        return _readable(call, calls)


def _brief(call: CallDescription) -> bytes:
    """A description that can be sent: without sizes, for which the signature stands, where it is long."""
    room = _DESCRIPTION_BYTES - _SIGNATURE_BYTES - 2
    data = call.encode()
    return data if len(data) <= room else msgspec.structs.replace(call, sizes=()).encode()[:room]


def _readable(call: CallDescription, calls: list[CallDescription | None]) -> list[CallDescription]:
    """All descriptions, where `call` stands for those that are too long to be read and say the same."""
    if call.send_splits and None in calls:
        raise CapabilityError(
            f"{call.op}: the splits of rank {calls.index(None)} are more than a description holds; "
            "use a smaller group"
        )
    return [call if theirs is None else theirs for theirs in calls]
