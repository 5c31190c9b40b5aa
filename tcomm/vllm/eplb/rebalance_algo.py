"""`vllm.distributed.eplb.rebalance_algo`."""

from tcomm.eplb.tensors import compute_logical_maps, rebalance_experts

__all__ = ["compute_logical_maps", "rebalance_experts"]
