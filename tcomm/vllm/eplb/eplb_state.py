"""`vllm.distributed.eplb.eplb_state`."""

from tcomm.eplb.policies import EPLB_POLICIES, AbstractEplbPolicy, DefaultEplbPolicy
from tcomm.eplb.state.model_state import EplbLayerState, EplbModelState
from tcomm.eplb.state.protocol import MixtureOfExperts
from tcomm.eplb.state.state import EplbState
from tcomm.eplb.state.statistics import EplbStats
from tcomm.groups.helpers.loggers import init_logger
from tcomm.groups.parallel.parallel_config import ParallelConfig
from tcomm.groups.parallel.parallel_state import (
    get_ep_group,
    get_node_count,
)
from tcomm.groups.stateless.group import StatelessProcessGroup
from tcomm.groups.stateless.same_node import in_the_same_node_as

__all__ = [
    "EPLB_POLICIES",
    "AbstractEplbPolicy",
    "DefaultEplbPolicy",
    "EplbLayerState",
    "EplbModelState",
    "EplbState",
    "EplbStats",
    "MixtureOfExperts",
    "ParallelConfig",
    "StatelessProcessGroup",
    "get_ep_group",
    "get_node_count",
    "in_the_same_node_as",
    "init_logger",
]
