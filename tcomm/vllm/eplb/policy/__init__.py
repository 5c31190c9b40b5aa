"""`vllm.distributed.eplb.policy`."""

from tcomm.eplb.policies import EPLB_POLICIES, AbstractEplbPolicy, DefaultEplbPolicy

__all__ = ["EPLB_POLICIES", "AbstractEplbPolicy", "DefaultEplbPolicy"]
