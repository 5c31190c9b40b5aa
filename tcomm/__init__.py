"""tcomm: multi-GPU communication written as Triton kernels over symmetric memory."""

from tcomm.errors import (
    CapabilityError,
    CollectiveMismatchError,
    CommError,
    ConfigError,
    DecodeError,
    DuplicateRankError,
    GroupClosedError,
    GroupMismatchError,
    PeerLostError,
    PeerTimeoutError,
    QueueFullError,
    RendezvousError,
    TcommError,
    UsageError,
)
from tcomm.groups.communicator import Communicator
from tcomm.groups.graphs import GraphCaptureContext, graph_capture
from tcomm.groups.virtual import VirtualRanks
from tcomm.groups.work import Work
from tcomm.tuning.choose import Decision

__all__ = [
    "CapabilityError",
    "CollectiveMismatchError",
    "CommError",
    "Communicator",
    "ConfigError",
    "Decision",
    "DecodeError",
    "DuplicateRankError",
    "GraphCaptureContext",
    "GroupClosedError",
    "GroupMismatchError",
    "PeerLostError",
    "PeerTimeoutError",
    "QueueFullError",
    "RendezvousError",
    "TcommError",
    "UsageError",
    "VirtualRanks",
    "Work",
    "graph_capture",
]

__version__ = "0.1.0"
