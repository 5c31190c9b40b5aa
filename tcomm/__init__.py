"""tcomm: multi-GPU communication written as Triton kernels over symmetric memory."""

# isort: off
# First the names of the group layer: where names meet, what follows counts.
from tcomm.vllm import *  # noqa: F403

# isort: on
from tcomm import vllm
from tcomm.errors import (
    CapabilityError,
    CollectiveMismatchError,
    CommError,
    ConfigError,
    DecodeError,
    DuplicateRankError,
    GroupClosedError,
    GroupMismatchError,
    NotOfferedError,
    PeerLostError,
    PeerTimeoutError,
    QueueFullError,
    RendezvousError,
    TcommError,
    UsageError,
)
from tcomm.groups.communicator import Communicator
from tcomm.groups.graphs import GraphCaptureContext, graph_capture  # type: ignore[assignment]
from tcomm.groups.parallel.current_config import current_parallel_config, use_parallel_config
from tcomm.groups.parallel.eplb_config import EPLBConfig
from tcomm.groups.parallel.parallel_config import ParallelConfig
from tcomm.groups.parallel.state import ParallelState
from tcomm.groups.parallel.state import use as use_parallel_state
from tcomm.groups.virtual import VirtualRanks
from tcomm.groups.work import Work
from tcomm.objects.codec import register
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
    "EPLBConfig",
    "GraphCaptureContext",
    "GroupClosedError",
    "GroupMismatchError",
    "NotOfferedError",
    "ParallelConfig",
    "ParallelState",
    "PeerLostError",
    "PeerTimeoutError",
    "QueueFullError",
    "RendezvousError",
    "TcommError",
    "UsageError",
    "VirtualRanks",
    "Work",
    "current_parallel_config",
    "graph_capture",
    "register",
    "use_parallel_config",
    "use_parallel_state",
]
__all__ += [name for name in vllm.__all__ if name not in __all__]

__version__ = "0.1.0"
