"""Every `TCOMM_*` variable, read here and nowhere else. `docs/environment.md` is the user's table."""

from __future__ import annotations

import difflib
import functools
import logging
import os
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from tcomm.errors import ConfigError

__all__ = [
    "TIMEOUT_PROFILES",
    "WITHOUT_EFFECT",
    "Config",
    "EngineConfig",
    "LoggingLevel",
    "let_ranks_share_a_device",
    "resolve_timeout",
    "stop_engine_multiprocessing",
]

logger = logging.getLogger("tcomm")

TIMEOUT_PROFILES: dict[str, float | None] = {
    "default": 120.0,
    "ml_inference": 600.0,
    "batch_job": None,
    "streaming": 1800.0,
}
"""Seconds that a collective may wait, by profile. None: as long as the peers live."""

Positive = Annotated[int, msgspec.Meta(ge=1)]
NotNegative = Annotated[int, msgspec.Meta(ge=0)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
LoggingLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]


class Config(msgspec.Struct, frozen=True):
    """The settings of a process, from its environment."""

    algorithm: str = ""
    """TCOMM_ALGORITHM: engine, algorithm or engine:algorithm that every collective must use."""
    timeout: str = "default"
    """TCOMM_TIMEOUT: seconds or a profile, for calls that give none."""
    staging_bytes: int = 8 * 1024 * 1024
    """TCOMM_STAGING_BYTES: staging memory of each rank of a group, until `prepare` makes it larger."""
    shm_dir: str = "/dev/shm"
    """TCOMM_SHM_DIR: memory file system for the CPU transport."""
    table: str = ""
    """TCOMM_TABLE: tuning table to use instead of the one that comes with tcomm; rank 0's counts."""
    spins: int = 0
    """TCOMM_SPINS: polls before a CPU wait yields; 0: by the number of cores."""
    deterministic: bool = False
    """TCOMM_DETERMINISTIC: use nothing that adds in an order of its own, as the switch does."""
    nvshmem_home: str = ""
    """TCOMM_NVSHMEM_HOME: directory of the NVSHMEM whose bitcode kernels link, with `lib` and `include`."""
    allow_shared_device: bool = False
    """TCOMM_ALLOW_SHARED_DEVICE: let several ranks use one GPU, which gives multicast up."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Config:
        """Read and check the variables.

        Raises:
            ConfigError: when one has a value that makes no sense; names it.
        """
        environ = os.environ if environ is None else environ
        given = {k.removeprefix("TCOMM_").lower(): v for k, v in environ.items() if k.startswith("TCOMM_")}
        fields = cls.__struct_fields__
        engine = [
            field for field, (name, *_) in EngineConfig.variables().items() if name.startswith("TCOMM_")
        ]
        for unknown in sorted(set(given) - {*fields, *engine}):
            close = difflib.get_close_matches(unknown, [*fields, *engine], 1)
            hint = f"; did you mean TCOMM_{close[0].upper()}?" if close else ""
            logger.warning("TCOMM_%s is not a variable of tcomm%s", unknown.upper(), hint)
        try:
            config = msgspec.convert({k: given[k] for k in fields if k in given}, cls, strict=False)
        except msgspec.ValidationError as error:
            raise ConfigError(f"a TCOMM_ variable is wrong: {error}") from error
        resolve_timeout(config.timeout)
        if config.spins < 0:
            raise ConfigError(f"TCOMM_SPINS={config.spins} is negative; give 0 for the default")
        if config.staging_bytes % 4096 or config.staging_bytes <= 0:
            raise ConfigError(
                f"TCOMM_STAGING_BYTES={config.staging_bytes} is no positive multiple of the page size, 4096"
            )
        return config


class EngineConfig(msgspec.Struct, frozen=True):
    """What the group layer reads: `TCOMM_<NAME>`, or `VLLM_<NAME>` where that is unset or empty."""

    secret: str = ""
    """TCOMM_SECRET: shared by the processes of a job; needed to listen on anything but loopback."""
    host_ip: str = ""
    """TCOMM_HOST_IP: address at which other hosts reach this one."""
    port: Port | None = None
    """TCOMM_PORT: where the search for a free port starts; unset: the kernel chooses."""
    pp_layer_partition: str = ""
    """TCOMM_PP_LAYER_PARTITION: layers of each pipeline stage, as `5,5,6,4`; empty: evenly."""

    local_rank: NotNegative | None = None
    """LOCAL_RANK: rank among the processes of this host."""
    rank: NotNegative | None = None
    """RANK: rank in the job."""
    world_size: Positive | None = None
    """WORLD_SIZE: ranks of the job."""
    master_addr: str = ""
    """MASTER_ADDR: address where the ranks meet."""
    master_port: Port | None = None
    """MASTER_PORT: port where the ranks meet."""
    cuda_visible_devices: str = ""
    """CUDA_VISIBLE_DEVICES: the GPUs that this process sees; CUDA's own."""
    no_color: str = ""
    """NO_COLOR: no colours in the log, whatever it is set to."""

    dp_size: Positive = 1
    """TCOMM_DP_SIZE: data parallel size of a `ParallelConfig` that names none."""
    dp_rank: NotNegative = 0
    """TCOMM_DP_RANK: data parallel rank, likewise."""
    dp_rank_local: NotNegative | None = None
    """TCOMM_DP_RANK_LOCAL: data parallel rank on this host; unset: as TCOMM_DP_RANK."""
    dp_master_ip: str = "127.0.0.1"
    """TCOMM_DP_MASTER_IP: address where the data parallel ranks meet."""
    dp_master_port: Port = 0
    """TCOMM_DP_MASTER_PORT: port where they meet."""
    all2all_backend: str = ""
    """TCOMM_ALL2ALL_BACKEND: overrides `ParallelConfig.all2all_backend`; deprecated."""
    batch_invariant: bool = False
    """TCOMM_BATCH_INVARIANT: sums in a fixed order; turns custom all-reduces off in a `ParallelConfig`."""

    configure_logging: bool | None = None
    """TCOMM_CONFIGURE_LOGGING: 1: `init_logger` gives the logger "tcomm" a handler; 0: never."""
    logging_config_path: str = ""
    """TCOMM_LOGGING_CONFIG_PATH: JSON file for `logging.config.dictConfig`; asks for configuration."""
    logging_level: LoggingLevel = "INFO"
    """TCOMM_LOGGING_LEVEL: of the logger "tcomm"; DEBUG also keeps `suppress_stdout` from acting."""
    logging_prefix: str = ""
    """TCOMM_LOGGING_PREFIX: before every line."""
    logging_stream: Literal["ext://sys.stdout", "ext://sys.stderr"] = "ext://sys.stdout"
    """TCOMM_LOGGING_STREAM: where lines go."""
    logging_color: Literal["auto", "0", "1"] = "auto"
    """TCOMM_LOGGING_COLOR: colour the level: on a terminal, never, always."""

    ringbuffer_warning_interval: Positive = 60
    """TCOMM_RINGBUFFER_WARNING_INTERVAL: seconds between warnings that a message queue waits."""
    rpc_base_path: str = ""
    """TCOMM_RPC_BASE_PATH: directory of sockets between processes; empty: the temporary one."""

    deepep_buffer_size_mb: Positive = 1024
    """TCOMM_DEEPEP_BUFFER_SIZE_MB: MiB on each rank for the high-throughput exchange of tokens."""
    nixl_ep_max_num_ranks: Positive = 32
    """TCOMM_NIXL_EP_MAX_NUM_RANKS: ranks that an expert group which grows may come to have."""

    sleep_when_idle: bool = False
    """TCOMM_SLEEP_WHEN_IDLE: without effect; see `WITHOUT_EFFECT`, as of all that follow."""
    cache_root: str = "~/.cache/vllm"
    dist_ident: str = ""
    skip_p2p_check: bool = True
    allreduce_use_symm_mem: bool = True
    use_nccl_symm_mem: bool = False
    disable_pynccl: bool = False
    nccl_so_path: str = ""
    custom_allreduce_algo: str = ""
    rocm_quick_reduce_quantization: str = "NONE"
    rocm_quick_reduce_cast_bf16_to_fp16: bool = True
    rocm_quick_reduce_max_size_bytes_mb: int | None = None
    allreduce_use_flashinfer: bool = True
    allreduce_use_flashinfer_pcie_ipc: bool = False
    flashinfer_allreduce_backend: str = "auto"
    distributed_use_split_group: bool = False
    elastic_ep_scale_up_launch: bool = False
    deepep_high_throughput_force_intra_node: bool = False
    deepep_low_latency_use_mnnvl: bool = False
    deepepll_nvfp4_dispatch: bool = False
    deepep_v2_allow_hybrid_mode: bool = True
    deepep_v2_prefer_overlap: bool = False
    deepep_v2_allow_multiple_reduction: bool = False
    moe_dp_chunk_size: Positive = 256
    moe_skip_padding: bool = True
    flashinfer_moe_a2a_low_precision_combine: bool = False

    @classmethod
    def variables(cls) -> dict[str, tuple[str, ...]]:
        """The variables of each field; the first that is set counts."""
        names = {}
        for field in cls.__struct_fields__:
            prefixes = ("",) if field in _PLAIN else ("TCOMM_",) if field in _OURS else ("TCOMM_", "VLLM_")
            names[field] = tuple(prefix + field.upper() for prefix in prefixes)
        return names

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> EngineConfig:
        """Read and check the variables. Each that is set without effect is told once per process.

        Raises:
            ConfigError: when one has a value that makes no sense; names it.
        """
        environ = os.environ if environ is None else environ
        given: dict[str, tuple[str, str]] = {}
        for field, names in cls.variables().items():
            for name in names:
                if environ.get(name):
                    given[field] = name, environ[name]
                    break
        values = {field: value for field, (_, value) in given.items()}
        if "logging_level" in values:
            values["logging_level"] = values["logging_level"].upper()
        try:
            config = msgspec.convert(values, cls, strict=False)
        except msgspec.ValidationError as error:
            wanted, _, field = str(error).rpartition(" - at `$.")
            raise ConfigError(f"{'='.join(given[field.rstrip('`')])} is wrong: {wanted}") from error
        for field in sorted(WITHOUT_EFFECT.keys() & given.keys()):
            _tell_without_effect(given[field][0], WITHOUT_EFFECT[field])
        return config


_PLAIN = frozenset(
    ("local_rank", "rank", "world_size", "master_addr", "master_port", "cuda_visible_devices", "no_color")
)
_OURS = frozenset(("secret",))

_CHOOSES = "TCOMM_ALGORITHM says what a collective uses, the tuning table where it is unset"
_TORCHS = "NCCL is torch's own, and reached through it"
_SHARED = "tokens go through memory that ranks share"
_ONE_BUFFER = "there is one kind of buffer"

WITHOUT_EFFECT: dict[str, str] = {
    "sleep_when_idle": "an idle wait costs no core",
    "rpc_base_path": "no sockets are made in the file system",
    "cache_root": "nothing found out about a machine is kept in files",
    "dist_ident": "tcomm names its shared memory itself",
    "skip_p2p_check": "the ranks of a group always find out together what they reach",
    "allreduce_use_symm_mem": _CHOOSES,
    "custom_allreduce_algo": _CHOOSES,
    "rocm_quick_reduce_quantization": _CHOOSES,
    "rocm_quick_reduce_cast_bf16_to_fp16": _CHOOSES,
    "rocm_quick_reduce_max_size_bytes_mb": _CHOOSES,
    "allreduce_use_flashinfer": _CHOOSES,
    "allreduce_use_flashinfer_pcie_ipc": _CHOOSES,
    "flashinfer_allreduce_backend": _CHOOSES,
    "use_nccl_symm_mem": _TORCHS,
    "disable_pynccl": _TORCHS,
    "nccl_so_path": _TORCHS,
    "distributed_use_split_group": "groups are made by torch.distributed.new_group",
    "elastic_ep_scale_up_launch": "groups do not grow",
    "deepep_high_throughput_force_intra_node": _SHARED,
    "deepep_low_latency_use_mnnvl": _SHARED,
    "deepepll_nvfp4_dispatch": "the low-latency exchange quantises to fp8 or not at all",
    "deepep_v2_allow_hybrid_mode": _ONE_BUFFER,
    "deepep_v2_prefer_overlap": _ONE_BUFFER,
    "deepep_v2_allow_multiple_reduction": _ONE_BUFFER,
    "moe_dp_chunk_size": "layers say how many tokens an exchange is for",
    "moe_skip_padding": "layers say which tokens they dispatch",
    "flashinfer_moe_a2a_low_precision_combine": "sums are float32",
}
"""Why a field of `EngineConfig` changes nothing here; it is read and checked all the same."""


@functools.cache
def _tell_without_effect(variable: str, why: str) -> None:
    logger.warning("%s has no effect here: %s", variable, why)


def resolve_timeout(timeout: float | str | None) -> float | None:
    """Seconds of a timeout given as a number, a profile or None.

    Raises:
        ConfigError: when it is neither, or not positive.
    """
    if timeout is None:
        return None
    if isinstance(timeout, str) and timeout in TIMEOUT_PROFILES:
        return TIMEOUT_PROFILES[timeout]
    try:
        seconds = float(timeout)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(
            f"timeout {timeout!r} is neither seconds nor one of {', '.join(TIMEOUT_PROFILES)}"
        ) from None
    if not seconds > 0:
        raise ConfigError(f"timeout {timeout!r} is not a positive number of seconds")
    return seconds


def let_ranks_share_a_device() -> None:
    """Have torch map symmetric memory between ranks on one GPU. Before the first such memory is made."""
    if os.environ.get(_TORCH_OVERLAP) != "1":
        os.environ[_TORCH_OVERLAP] = "1"
        logger.info("TCOMM_ALLOW_SHARED_DEVICE: set %s=1 for torch in this process", _TORCH_OVERLAP)


def stop_engine_multiprocessing() -> None:
    """Tell an inference engine in this process that its ranks were started from outside."""
    if os.environ.get(_ENGINE_PROCESSES) != "0":
        os.environ[_ENGINE_PROCESSES] = "0"
        logger.info("external launcher: set %s=0 in this process", _ENGINE_PROCESSES)


_ENGINE_PROCESSES = "VLLM_ENABLE_V1_MULTIPROCESSING"
_TORCH_OVERLAP = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
