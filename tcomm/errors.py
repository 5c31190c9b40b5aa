"""The exceptions of tcomm, one tree.

::

    TcommError
    |-- ConfigError (ValueError)            an argument, a variable or a table is wrong: the caller's to mend
    |   `-- UsageError (AssertionError)     a function of the group layer was called out of place or wrongly
    |-- CapabilityError                     this machine, build or dtype cannot do what was asked
    |   `-- NotOfferedError (NotImplementedError)  an object of this kind does not offer the method
    |-- RendezvousError                     the ranks did not find one another
    |   |-- GroupMismatchError              they did, and disagree about the group
    |   `-- DuplicateRankError              two processes claim one rank
    `-- CommError (RuntimeError)            a collective failed; carries group, op, seq, rank, peers
        |-- PeerLostError                   a peer is dead or has left
        |-- PeerTimeoutError (TimeoutError) a peer is alive or unknown, and silent past the deadline
        |-- CollectiveMismatchError         the ranks called different things
        |-- GroupClosedError                the group is closed, or belongs to another process
        |-- QueueFullError                  a reader lags and the writer's deadline passed
        `-- DecodeError                     received bytes are not what the protocol allows

A message says what was given, what was needed and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "CapabilityError",
    "CollectiveMismatchError",
    "CommError",
    "ConfigError",
    "DecodeError",
    "DuplicateRankError",
    "GroupClosedError",
    "GroupMismatchError",
    "NotOfferedError",
    "PeerLostError",
    "PeerTimeoutError",
    "QueueFullError",
    "RendezvousError",
    "TcommError",
    "UsageError",
]


class TcommError(Exception):
    """The root: `except TcommError` catches all that tcomm raises on purpose."""


class ConfigError(TcommError, ValueError):
    """An argument, an environment variable or a table is wrong. Nothing was sent."""


class UsageError(ConfigError, AssertionError):
    """A function of the group layer was called out of place, or with what it cannot take.

    An `AssertionError` too: that is what users of vllm.distributed catch there.
    """


class CapabilityError(TcommError):
    """This machine, build, transport or dtype cannot do what was asked for by name."""


class NotOfferedError(CapabilityError, NotImplementedError):
    """An object of this kind does not offer the method; another kind does. Nothing was sent."""


class RendezvousError(TcommError):
    """The ranks of a group did not come together before the deadline."""


class GroupMismatchError(RendezvousError):
    """The ranks came together and disagree about what group they are building."""


class DuplicateRankError(RendezvousError):
    """Two processes claim the same rank of one group."""


class CommError(TcommError, RuntimeError):
    """A collective did not complete.

    Attributes:
        group: name of the group.
        op: the verb, such as `"all_reduce"`.
        seq: the group's call number (epoch) at which it failed.
        rank: the rank that raises, within the group.
        peers: the ranks at fault, within the group; empty when nobody in particular is.
    """

    def __init__(
        self,
        message: str,
        *,
        group: str = "",
        op: str = "",
        seq: int = -1,
        rank: int = -1,
        peers: Sequence[int] = (),
    ) -> None:
        super().__init__(message)
        self.group = group
        self.op = op
        self.seq = seq
        self.rank = rank
        self.peers = tuple(peers)


class PeerLostError(CommError):
    """A peer is dead, or has left the group. The group cannot be used any more."""


class PeerTimeoutError(CommError, TimeoutError):
    """A peer did not arrive before the deadline and is not known to be dead."""


class CollectiveMismatchError(CommError):
    """The ranks called different collectives at the same place. The group stays usable."""


class GroupClosedError(CommError):
    """The group was closed, or is used in a process that did not create it."""


class QueueFullError(CommError):
    """A reader lags behind and the writer's deadline passed. Nothing was lost."""


class DecodeError(CommError):
    """Received bytes are not what the protocol allows. Later messages of a queue are unharmed."""
