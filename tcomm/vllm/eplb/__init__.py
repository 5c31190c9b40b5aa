"""`vllm.distributed.eplb`: planning, and what it takes from other modules. State is not there yet."""

from tcomm.eplb.policies import EPLB_POLICIES, AbstractEplbPolicy, DefaultEplbPolicy
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
    "ParallelConfig",
    "StatelessProcessGroup",
    "compute_logical_maps",
    "get_ep_group",
    "get_node_count",
    "in_the_same_node_as",
    "init_logger",
    "rebalance_experts",
]
