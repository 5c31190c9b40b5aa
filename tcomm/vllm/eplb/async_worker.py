"""`vllm.distributed.eplb.async_worker`."""

from tcomm.eplb.state.background import start_async_worker

__all__ = ["start_async_worker"]
