"""`vllm.distributed.eplb.policy.abstract`."""

from tcomm.eplb.policies import AbstractEplbPolicy

__all__ = ["AbstractEplbPolicy"]
