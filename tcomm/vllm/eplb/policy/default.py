"""`vllm.distributed.eplb.policy.default`."""

from tcomm.eplb.policies import DefaultEplbPolicy

__all__ = ["DefaultEplbPolicy"]
