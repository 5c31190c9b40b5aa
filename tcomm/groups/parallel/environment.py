"""Joining the processes of a job, and taking everything down again."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
from datetime import timedelta

import torch
import torch.distributed as dist

from tcomm.config import EngineConfig
from tcomm.errors import UsageError
from tcomm.groups.helpers.names import get_distributed_init_method
from tcomm.groups.parallel import state
from tcomm.groups.parallel.current_config import current_parallel_config
from tcomm.groups.parallel.parallel_config import ParallelConfig

__all__ = [
    "cleanup_dist_env_and_memory",
    "destroy_distributed_environment",
    "destroy_model_parallel",
    "init_distributed_environment",
]

logger = logging.getLogger("tcomm")


def init_distributed_environment(
    world_size: int = -1,
    rank: int = -1,
    distributed_init_method: str | None = "env://",
    local_rank: int = -1,
    backend: str = "nccl",
    timeout: timedelta | None = None,
) -> None:
    """Join torch.distributed where that has not been done, and make the group of all ranks. **Collective.**

    Called again, it only checks. Under torchrun, or where somebody initialised torch.distributed, its world
    is adopted and only `local_rank` and `backend` matter.

    Args:
        world_size: ranks; of one data parallel replica where a current config has several.
        rank: of this process, likewise; -1 for both: from the environment.
        distributed_init_method: `env://`, `tcp://host:port` or `file:///path`.
        local_rank: number on its host; -1: LOCAL_RANK with `env://`, else `rank`.
        backend: of the device groups. One that this machine lacks becomes gloo, with a warning.
        timeout: of torch.distributed's own calls.

    Raises:
        UsageError: when there is no init method, and when the world has another size than before.
        RendezvousError: as `Communicator` does.
    """
    config = current_parallel_config()
    if not dist.is_initialized():
        if distributed_init_method is None:
            raise UsageError(
                "distributed_init_method must be provided when initializing distributed environment"
            )
        backend = _available(backend)
        method, size, number = _across_replicas(config, distributed_init_method, world_size, rank)
        dist.init_process_group(backend, init_method=method, world_size=size, rank=number, timeout=timeout)
    else:
        backend = _available(backend)
    if local_rank == -1:
        from_environment = EngineConfig.from_environment().local_rank or 0
        local_rank = from_environment if distributed_init_method == "env://" else max(rank, 0)
    state.current().init_world(local_rank, backend, config)


def _available(backend: str) -> str:
    """The backend, or gloo where this machine cannot use it."""
    if dist.is_backend_available(backend) and (backend != "nccl" or torch.cuda.is_available()):
        return backend
    if not dist.is_gloo_available():
        raise UsageError("Fallback Gloo backend is not available.")
    logger.warning("torch.distributed cannot use %s here; using gloo", backend)
    return "gloo"


def _across_replicas(
    config: ParallelConfig | None, method: str, world_size: int, rank: int
) -> tuple[str, int, int]:
    """Init method, world size and rank over all data parallel replicas."""
    if config is None or config.distributed_executor_backend == "external_launcher":
        return method, world_size, rank
    if config.nnodes <= 1 and config.data_parallel_size <= 1:
        return method, world_size, rank
    rank += config.data_parallel_rank * world_size
    address = (
        (config.master_addr, config.master_port)
        if config.nnodes > 1
        else (config.data_parallel_master_ip, config.get_next_dp_init_port())
    )
    return get_distributed_init_method(*address), config.world_size_across_dp, rank


def destroy_model_parallel() -> None:
    """Destroy the model parallel groups of the current state. Not collective; may be called twice."""
    state.current().destroy_model_parallel()


def destroy_distributed_environment() -> None:
    """Destroy the current state's world, and torch.distributed's. Not collective; may be called twice."""
    is_foreign = state.current().is_foreign
    state.current().destroy()
    # In a child after a fork, torch.distributed has nothing of its own to take down.
    if dist.is_initialized() and not is_foreign:
        dist.destroy_process_group()


def cleanup_dist_env_and_memory(shutdown_ray: bool = False) -> None:
    """Take all groups down and give memory back, on a GPU too. Not collective; safe at any time.

    Args:
        shutdown_ray: call `ray.shutdown()` as well.

    Raises:
        ImportError: when Ray is to be shut down and is not installed.
    """
    gc.unfreeze()
    destroy_model_parallel()
    destroy_distributed_environment()
    if shutdown_ray:
        importlib.import_module("ray").shutdown()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        with contextlib.suppress(AttributeError):
            torch._C._host_emptyCache()
