"""`vllm.distributed.device_communicators.all2all`. The managers that dispatch tokens are not there yet."""

from tcomm.vllm.parallel_state import get_dp_group, get_tp_group, in_the_same_node_as

__all__ = ["get_dp_group", "get_tp_group", "in_the_same_node_as"]
