"""What the fields of a `ParallelConfig` may be together."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING

import torch

from tcomm.config import Config
from tcomm.errors import ConfigError

if TYPE_CHECKING:
    from tcomm.groups.parallel.parallel_config import ParallelConfig

__all__ = [
    "ALL2ALL_BACKENDS",
    "EXECUTORS",
    "PLACEMENT",
    "SEQUENCE_PARALLEL_BACKENDS",
    "check_data_parallel",
    "check_executor",
    "check_expert_parallel",
    "check_nodes",
    "check_offline",
    "check_sizes",
    "choose_executor",
    "nodes_of_replica",
]

EXECUTORS = ("ray", "mp", "uni", "external_launcher")
SEQUENCE_PARALLEL_BACKENDS = (
    "allgather_reducescatter",
    "naive",
    "deepep_high_throughput",
    "deepep_low_latency",
)
ALL2ALL_BACKENDS = (
    *SEQUENCE_PARALLEL_BACKENDS,
    "pplx",
    "flashinfer_all2allv",
    "flashinfer_nvlink_two_sided",
    "flashinfer_nvlink_one_sided",
    "deepep_v2",
    "mori_high_throughput",
    "mori_low_latency",
    "moonep",
    "nixl_ep",
    "passthrough",
    "auto",
)

PLACEMENT = frozenset(
    (
        "data_parallel_size_local",
        "data_parallel_rank",
        "data_parallel_rank_local",
        "data_parallel_index",
        "data_parallel_master_ip",
        "data_parallel_rpc_port",
        "data_parallel_master_port",
        "data_parallel_backend",
        "data_parallel_external_lb",
        "data_parallel_hybrid_lb",
        "max_parallel_loading_workers",
        "ray_workers_use_nsight",
        "ray_runtime_env",
        "placement_group",
        "distributed_executor_backend",
        "worker_cls",
        "sd_worker_cls",
        "worker_extension_cls",
        "master_addr",
        "master_port",
        "node_rank",
        "nnodes",
        "distributed_timeout_seconds",
        "cpu_distributed_timeout_seconds",
        "world_size",
        "rank",
        "_data_parallel_master_port_list",
        "_api_process_count",
        "_api_process_rank",
    )
)
"""Fields that say where a computation runs, not what it is."""

_POSITIVE = (
    "pipeline_parallel_size",
    "tensor_parallel_size",
    "prefill_context_parallel_size",
    "decode_context_parallel_size",
    "data_parallel_size",
    "nnodes",
    "dcp_kv_cache_interleave_size",
    "cp_kv_cache_interleave_size",
    "_api_process_count",
)
_POSITIVE_OR_NONE = (
    "max_parallel_loading_workers",
    "elastic_ep_max_dp_size",
    "distributed_timeout_seconds",
    "cpu_distributed_timeout_seconds",
)
_NOT_NEGATIVE = (
    "data_parallel_size_local",
    "ubatch_size",
    "dbo_decode_token_threshold",
    "dbo_prefill_token_threshold",
    "node_rank",
    "rank",
)
_PORTS = ("data_parallel_rpc_port", "data_parallel_master_port", "master_port")
_BOOLEANS = (
    "data_parallel_external_lb",
    "data_parallel_hybrid_lb",
    "enable_expert_parallel",
    "enable_eplb",
    "enable_elastic_ep",
    "disable_custom_all_reduce",
    "enable_dbo",
    "ray_workers_use_nsight",
    "enable_multimodal_encoder_data_parallel",
)
_BOOLEANS_OR_NONE = ("is_moe_model", "disable_nccl_for_dp_synchronization")
_STRINGS = ("worker_cls", "sd_worker_cls", "worker_extension_cls")
_ADDRESSES = ("data_parallel_master_ip", "master_addr")
_MOST = (1 << 63) - 1
_CHOICES = {
    "data_parallel_backend": ("mp", "ray"),
    "expert_placement_strategy": ("linear", "round_robin"),
}


def check_sizes(config: ParallelConfig) -> None:
    """Check each field alone, and the decode context parallel size against those it is made of.

    Raises:
        ConfigError: when one is out of its range.
    """
    for name in _POSITIVE:
        _check_integer(name, getattr(config, name), 1)
    for name in _POSITIVE_OR_NONE:
        if getattr(config, name) is not None:
            _check_integer(name, getattr(config, name), 1)
    for name in _NOT_NEGATIVE:
        _check_integer(name, getattr(config, name), 0)
    for name in _PORTS:
        _check_integer(name, getattr(config, name), 0, 65535)
    for name, known in _CHOICES.items():
        if getattr(config, name) not in known:
            raise ConfigError(f"{name}={getattr(config, name)!r} is none of {', '.join(known)}")
    if config.all2all_backend not in ALL2ALL_BACKENDS:
        raise ConfigError(
            f"Unknown all2all backend: {config.all2all_backend}; give one of {', '.join(ALL2ALL_BACKENDS)}"
        )
    _check_kinds(config)
    _check_integer("_api_process_rank", config._api_process_rank, -1)
    if config._api_process_rank >= config._api_process_count:
        raise ConfigError(
            f"_api_process_rank={config._api_process_rank} is no rank of {config._api_process_count}"
        )
    _check_context(config)
    _check_micro_batches(config)


def _check_kinds(config: ParallelConfig) -> None:
    for name in (*_BOOLEANS, *_BOOLEANS_OR_NONE):
        value = getattr(config, name)
        if type(value) is not bool and (name in _BOOLEANS or value is not None):
            wanted = "True or False" if name in _BOOLEANS else "True, False or None"
            raise ConfigError(f"{name}={value!r} is wrong; give {wanted}")
    for name in (*_STRINGS, *_ADDRESSES):
        value = getattr(config, name)
        if not isinstance(value, str) or (name in _ADDRESSES and not value):
            wanted = "the name or address of a host" if name in _ADDRESSES else "the name of a class"
            raise ConfigError(f"{name}={value!r} is wrong; give {wanted}")
    for name in ("data_parallel_rank", "data_parallel_rank_local"):
        value = getattr(config, name)
        # Its bounds follow from what the environment says too.
        if type(value) is not int and not (name.endswith("local") and value is None):
            raise ConfigError(f"{name}={value!r} is wrong; give an integer")


def _check_integer(name: str, value: object, least: int, most: int = _MOST) -> None:
    if type(value) is not int or not least <= value <= most:
        bounds = f"{least} or more" if most == _MOST else f"{least} to {most}"
        raise ConfigError(f"{name}={value!r} is wrong; give an integer of {bounds}")


def _check_context(config: ParallelConfig) -> None:
    tp, pcp = config.tensor_parallel_size, config.prefill_context_parallel_size
    dcp = config.decode_context_parallel_size
    if pcp == 1 and tp % dcp:
        raise ConfigError(
            f"tensor_parallel_size={tp} is no multiple of decode_context_parallel_size={dcp}; give a divisor"
        )
    if pcp > 1 and dcp not in {1, pcp, tp * pcp}:
        raise ConfigError(
            f"decode_context_parallel_size={dcp} does not fit tensor_parallel_size={tp} and "
            f"prefill_context_parallel_size={pcp}; give 1, {pcp} or {tp * pcp}"
        )


def _check_micro_batches(config: ParallelConfig) -> None:
    if not config.use_ubatching:
        return
    for name in ("dbo_decode_token_threshold", "dbo_prefill_token_threshold"):
        if getattr(config, name) < config.num_ubatches:
            raise ConfigError(
                f"{name}={getattr(config, name)} is less than the {config.num_ubatches} micro-batches that a "
                "batch is cut into; each needs a token"
            )


def check_offline(config: ParallelConfig) -> None:
    """Check what the environment says about replicas.

    Raises:
        ConfigError: when it asks for replicas of a model without experts, which have nothing to share.
    """
    if config.data_parallel_size > 1 and config.is_moe_model is False:
        raise ConfigError(
            "Offline data parallel mode is not supported/useful for dense models. "
            f"Given: TCOMM_DP_SIZE={config.data_parallel_size}; start independent processes instead"
        )


def check_data_parallel(config: ParallelConfig) -> None:
    """Check the place of this replica.

    Raises:
        ConfigError: when there is no such place.
    """
    size, local, rank = config.data_parallel_size, config.data_parallel_size_local, config.data_parallel_rank
    if local > size:
        raise ConfigError(f"data_parallel_size_local ({local}) must be <= data_parallel_size ({size})")
    if type(rank) is not int or not 0 <= rank < size:
        raise ConfigError(f"data_parallel_rank ({rank}) must be in the range [0, {size})")
    if config.data_parallel_external_lb and size <= 1:
        raise ConfigError("data_parallel_external_lb can only be set when data_parallel_size > 1")


def check_expert_parallel(config: ParallelConfig) -> None:
    """Check that what experts are asked to do can be done.

    Raises:
        ConfigError: when it cannot.
    """
    redundant = config.eplb_config.num_redundant_experts
    if config.enable_eplb:
        if not config.enable_expert_parallel:
            raise ConfigError("enable_expert_parallel must be True to use EPLB.")
        tp, pcp = config.tensor_parallel_size, config.prefill_context_parallel_size
        if tp * pcp * config.data_parallel_size <= 1:
            raise ConfigError(
                "EPLB requires tensor_parallel_size, prefill_context_parallel_size or data_parallel_size "
                f"to be greater than 1, but got TP={tp}, PCP={pcp}, DP={config.data_parallel_size}."
            )
    elif redundant:
        raise ConfigError(
            f"num_redundant_experts is set to {redundant} but EPLB is not enabled; set enable_eplb=True, or 0"
        )
    if not config.enable_elastic_ep:
        return
    if not config.enable_eplb or config.pipeline_parallel_size > 1 or config.data_parallel_hybrid_lb:
        raise ConfigError(
            "enable_elastic_ep needs enable_eplb=True, pipeline_parallel_size=1 and "
            "data_parallel_hybrid_lb=False"
        )
    most = config.elastic_ep_max_dp_size
    if most is not None and most < config.data_parallel_size:
        raise ConfigError(
            f"elastic_ep_max_dp_size={most} is less than data_parallel_size={config.data_parallel_size}"
        )


def check_nodes(config: ParallelConfig) -> None:
    """Check that the nodes of a job hold whole replicas, or replicas whole nodes.

    Raises:
        ConfigError: when they do not, or there is no such node.
    """
    if config.node_rank >= config.nnodes:
        raise ConfigError(f"node_rank={config.node_rank} is no rank of nnodes={config.nnodes}")
    if config.nnodes == 1:
        return
    hosts = _hosts_of_replicas(config)
    if config.nnodes % hosts or config.world_size % (config.nnodes // hosts):
        raise ConfigError(
            f"nnodes={config.nnodes} do not hold data_parallel_size={config.data_parallel_size} replicas of "
            f"{config.world_size} ranks, data_parallel_size_local={config.data_parallel_size_local} to a "
            "place; give sizes that divide"
        )


def nodes_of_replica(config: ParallelConfig) -> int:
    """Nodes over which one replica goes."""
    return 1 if config.nnodes == 1 else config.nnodes // _hosts_of_replicas(config)


def _hosts_of_replicas(config: ParallelConfig) -> int:
    return max(1, config.data_parallel_size // max(1, config.data_parallel_size_local))


def choose_executor(config: ParallelConfig) -> str:
    """What starts the workers where nothing is said: one process, several of this host, or ray.

    Raises:
        ConfigError: when ray is needed and not installed.
    """
    if config.world_size == 1:
        return "uni"
    if config.nnodes > 1:
        return "mp"
    gpus = 0 if Config.from_environment().allow_shared_device else torch.cuda.device_count()
    if 0 < gpus < config.world_size:
        if not _has_ray():
            raise ConfigError(
                f"a world of {config.world_size} ranks is larger than the {gpus} GPUs of this node; install "
                "ray, or give distributed_executor_backend, nnodes= or smaller sizes"
            )
        return "ray"
    return "ray" if config.data_parallel_backend == "ray" or _is_placed_by_ray(config) else "mp"


def _has_ray() -> bool:
    return "ray" in sys.modules or importlib.util.find_spec("ray") is not None


def _is_placed_by_ray(config: ParallelConfig) -> bool:
    if not _has_ray():
        return False
    if config.placement_group is not None:
        return True
    # Only who has imported ray can be inside of one of its placement groups.
    ray = sys.modules.get("ray")
    return bool(ray and ray.is_initialized() and ray.util.get_current_placement_group())


def check_executor(config: ParallelConfig) -> None:
    """Check what starts the workers.

    Raises:
        ConfigError: when it does not exist, is not installed, or cannot do what is asked of it.
    """
    backend = config.distributed_executor_backend
    if not isinstance(backend, type) and backend not in EXECUTORS:
        raise ConfigError(
            f"Unrecognized distributed executor backend {backend!r}. Supported values are "
            f"{', '.join(EXECUTORS)}, or a class"
        )
    if backend == "ray" and not _has_ray():
        raise ConfigError("distributed_executor_backend='ray' needs ray, which is not installed")
    if config.ray_workers_use_nsight and not config.use_ray:
        raise ConfigError("Unable to use nsight profiling unless workers run with Ray.")
    if config.nnodes > 1 and backend not in {"mp", "uni", "external_launcher"}:
        raise ConfigError(
            f"nnodes={config.nnodes} needs distributed_executor_backend mp, uni or external_launcher, "
            f"not {backend!r}"
        )
