"""`vllm.distributed.eplb`: what it takes from other modules. State and algorithms are not there yet."""

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
    "EPLBConfig",
    "ParallelConfig",
    "StatelessProcessGroup",
    "get_ep_group",
    "get_node_count",
    "in_the_same_node_as",
    "init_logger",
]
