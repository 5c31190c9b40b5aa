"""`vllm.distributed.eplb`: planning, the state of balancing, and what it takes from other modules."""

from tcomm.eplb.moving.rearrange import rearrange_expert_weights_inplace
from tcomm.eplb.policies import EPLB_POLICIES, AbstractEplbPolicy, DefaultEplbPolicy
from tcomm.eplb.state.model_state import EplbLayerState, EplbModelState
from tcomm.eplb.state.protocol import MixtureOfExperts
from tcomm.eplb.state.state import EplbState
from tcomm.eplb.state.statistics import EplbStats
from tcomm.eplb.tensors import compute_logical_maps, rebalance_experts
from tcomm.groups.helpers.loggers import init_logger
from tcomm.groups.parallel.eplb_config import EPLBConfig
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
    "EPLBConfig",
    "EplbLayerState",
    "EplbModelState",
    "EplbState",
    "EplbStats",
    "MixtureOfExperts",
    "ParallelConfig",
    "StatelessProcessGroup",
    "compute_logical_maps",
    "get_ep_group",
    "get_node_count",
    "in_the_same_node_as",
    "init_logger",
    "rearrange_expert_weights_inplace",
    "rebalance_experts",
]
