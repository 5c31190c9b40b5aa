"""How a model is spread over processes, and the data parallel groups that follow from it."""

from __future__ import annotations

import errno
import hashlib
import logging
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import msgspec
import torch
import torch.distributed as dist

from tcomm.config import EngineConfig, stop_engine_multiprocessing
from tcomm.errors import ConfigError
from tcomm.groups.helpers.loggers import init_logger
from tcomm.groups.parallel import parallel_rules
from tcomm.groups.parallel.eplb_config import EPLBConfig
from tcomm.groups.parallel.forwarded import Forwarded
from tcomm.groups.parallel.ports import reserve_ports

__all__ = ["ParallelConfig"]

logger = logging.getLogger("tcomm")

_MASTER_PORT = 29500
_PORTS_KEPT = 5
_TRIES = 5
_NO_LIMIT = torch.iinfo(torch.int64).max

_NUM_REDUNDANT_EXPERTS = Forwarded("num_redundant_experts", 0)
_WINDOW_SIZE = Forwarded("window_size", 1000)
_STEP_INTERVAL = Forwarded("step_interval", 3000)
_LOG_BALANCEDNESS = Forwarded("log_balancedness", False)


@dataclass(kw_only=True)
class ParallelConfig:
    """How a model is spread over processes. Constructed by keyword.

    `num_redundant_experts`, `eplb_window_size`, `eplb_step_interval` and `eplb_log_balancedness` are older
    names of fields of `eplb_config`: reading and writing them reads and writes those.

    With a data parallel size above 1 and `data_parallel_master_port` left as it is, free ports of the
    master's address are found and kept where this host has it. Such a config is made once and sent to the
    other processes; those that make their own give a port.

    What differs from vllm.distributed: balancing experts does not need a GPU, since weights move between
    CPUs as well; custom all-reduces are not turned off without one, since kernels run there too;
    `world_size_across_dp` counts data parallel ranks once under "external_launcher"; no GPUs are counted
    where there are none, or where `TCOMM_ALLOW_SHARED_DEVICE=1`.

    Raises:
        ConfigError: when the fields make no sense, alone or together.
    """

    pipeline_parallel_size: int = 1
    """Stages of the pipeline."""
    tensor_parallel_size: int = 1
    """Ranks that share the tensors of a layer."""
    prefill_context_parallel_size: int = 1
    """Ranks that share the tokens of a prompt."""
    decode_context_parallel_size: int = 1
    """Ranks that share the cache while decoding; takes no ranks of its own."""
    data_parallel_size: int = 1
    """Replicas. 1: as `TCOMM_DP_SIZE` says, with the other `TCOMM_DP_` variables."""
    data_parallel_size_local: int = 1
    """Replicas on this host; 0: this process runs none."""
    data_parallel_rank: int = 0
    """This replica."""
    data_parallel_rank_local: int | None = None
    """This replica among those of its host."""
    data_parallel_index: int = field(init=False, default=0)
    """This replica; stays where an engine sets `data_parallel_rank` to another."""
    data_parallel_master_ip: str = "127.0.0.1"
    """Address where replicas meet."""
    data_parallel_rpc_port: int = 29550
    """Port of the engine's messages between replicas."""
    data_parallel_master_port: int = _MASTER_PORT
    """The next port where replicas meet."""
    data_parallel_backend: str = "mp"
    """"mp" or "ray": what starts replicas."""
    data_parallel_external_lb: bool = False
    """Somebody else spreads the requests over replicas."""
    data_parallel_hybrid_lb: bool = False
    """Somebody else spreads the requests over hosts."""
    is_moe_model: bool | None = None
    """Whether the model has experts; None: not known."""
    enable_expert_parallel: bool = False
    """Share experts among ranks whole, rather than each expert's tensors."""
    enable_eplb: bool = False
    """Balance experts between ranks while running."""
    eplb_config: EPLBConfig = field(default_factory=EPLBConfig)
    """How experts are balanced; copied. A dict of its fields will do; None is the default."""
    num_redundant_experts: Forwarded[int] = _NUM_REDUNDANT_EXPERTS
    """Older name of `eplb_config.num_redundant_experts`."""
    eplb_window_size: Forwarded[int] = _WINDOW_SIZE
    """Older name of `eplb_config.window_size`."""
    eplb_step_interval: Forwarded[int] = _STEP_INTERVAL
    """Older name of `eplb_config.step_interval`."""
    eplb_log_balancedness: Forwarded[bool] = _LOG_BALANCEDNESS
    """Older name of `eplb_config.log_balancedness`."""
    enable_elastic_ep: bool = False
    """Let the number of replicas change while running."""
    elastic_ep_max_dp_size: int | None = None
    """The most replicas there may be; None: as many as there are."""
    expert_placement_strategy: str = "linear"
    """"linear" or "round_robin": which experts a rank starts with."""
    all2all_backend: str = "allgather_reducescatter"
    """What brings tokens to experts and back."""
    max_parallel_loading_workers: int | None = None
    """How many workers load the model at a time; None: all."""
    disable_custom_all_reduce: bool = False
    """Leave all-reduces to torch. True on several nodes, and where `TCOMM_BATCH_INVARIANT=1`."""
    enable_dbo: bool = False
    """Overlap the two halves of a batch."""
    ubatch_size: int = 0
    """Micro-batches of a batch, without `enable_dbo`."""
    dbo_decode_token_threshold: int = 32
    """Tokens from which a batch that decodes is cut."""
    dbo_prefill_token_threshold: int = 512
    """Tokens from which a batch with prompts is cut."""
    disable_nccl_for_dp_synchronization: bool | None = None
    """Let replicas agree about batches by CPU; None: the engine decides."""
    ray_workers_use_nsight: bool = False
    """Profile ray's workers."""
    ray_runtime_env: Any = None
    """ray's environment of workers."""
    placement_group: Any = None
    """ray's placement of workers."""
    distributed_executor_backend: str | type | None = None
    """"mp", "ray", "uni", "external_launcher" or a class: what starts workers; None: what fits."""
    worker_cls: str = "auto"
    """Name of the class of workers."""
    sd_worker_cls: str = "auto"
    """Name of the class of speculative workers."""
    worker_extension_cls: str = ""
    """Name of a class that workers inherit besides."""
    master_addr: str = "127.0.0.1"
    """Address where the nodes of a job meet."""
    master_port: int = 29501
    """Port where they meet."""
    node_rank: int = 0
    """This node."""
    nnodes: int = 1
    """Nodes of the job."""
    distributed_timeout_seconds: int | None = None
    """How long groups of devices wait; None: as the backend does."""
    cpu_distributed_timeout_seconds: int | None = None
    """How long groups of CPUs wait; None: as the backend does."""
    dcp_kv_cache_interleave_size: int = 1
    """Tokens in a row on one rank of the cache that decoding shares."""
    cp_kv_cache_interleave_size: int = 1
    """Tokens in a row on one rank of the cache that either kind of context parallelism shares."""
    enable_multimodal_encoder_data_parallel: bool = False
    """Spread encoders of images by data, not by tensors."""
    world_size: int = field(init=False)
    """Ranks of a replica: PP x TP x PCP; of all replicas under "external_launcher"."""
    rank: int = 0
    """This process among those of `world_size`."""
    _data_parallel_master_port_list: list[int] = field(default_factory=list)
    _api_process_count: int = 1
    _api_process_rank: int = 0

    def __post_init__(self) -> None:
        # Setting an older name of one of its fields is not to change the one that was given.
        self.eplb_config = replace(self.eplb_config)
        if overriding := EngineConfig.from_environment().all2all_backend:
            told = init_logger("tcomm")
            told.warning_once("TCOMM_ALL2ALL_BACKEND is deprecated; set ParallelConfig.all2all_backend")
            self.all2all_backend = overriding
        parallel_rules.check_sizes(self)
        self._take_data_parallel_place()
        parallel_rules.check_data_parallel(self)
        self.data_parallel_index = self.data_parallel_rank
        self.world_size = self._replica_size
        if self.distributed_executor_backend == "external_launcher":
            self.world_size *= self.data_parallel_size
            stop_engine_multiprocessing()
        parallel_rules.check_expert_parallel(self)
        parallel_rules.check_nodes(self)
        if self.distributed_executor_backend is None:
            self.distributed_executor_backend = parallel_rules.choose_executor(self)
        if self.nnodes > 1 or EngineConfig.from_environment().batch_invariant:
            self.disable_custom_all_reduce = True
        self._verify_args()

    def _take_data_parallel_place(self) -> None:
        environment = EngineConfig.from_environment()
        if self.data_parallel_size == 1 and self.data_parallel_size_local:
            self.data_parallel_size = environment.dp_size
            self.data_parallel_rank = environment.dp_rank
            local = environment.dp_rank_local
            self.data_parallel_rank_local = environment.dp_rank if local is None else local
            self.data_parallel_master_ip = environment.dp_master_ip
            self.data_parallel_master_port = environment.dp_master_port
            parallel_rules.check_offline(self)
            return
        launched = self.distributed_executor_backend == "external_launcher"
        if launched and environment.rank is not None and self.data_parallel_rank == 0:
            self.data_parallel_rank = environment.rank // self._replica_size
        if self.data_parallel_master_port == _MASTER_PORT:
            ports = reserve_ports(self.data_parallel_master_ip, _PORTS_KEPT, self) or [_MASTER_PORT]
            self.data_parallel_master_port, *self._data_parallel_master_port_list = ports

    def _verify_args(self) -> ParallelConfig:
        """Check what starts the workers.

        Raises:
            ConfigError: when it does not exist, is not installed, or cannot do what is asked of it.
        """
        parallel_rules.check_executor(self)
        return self

    @property
    def _replica_size(self) -> int:
        sizes = (self.pipeline_parallel_size, self.tensor_parallel_size, self.prefill_context_parallel_size)
        return sizes[0] * sizes[1] * sizes[2]

    @property
    def world_size_across_dp(self) -> int:
        """Ranks of all replicas."""
        return self._replica_size * self.data_parallel_size

    @property
    def use_ray(self) -> bool:
        """Whether ray starts the workers."""
        backend = self.distributed_executor_backend
        return backend == "ray" or (isinstance(backend, type) and bool(getattr(backend, "uses_ray", False)))

    @property
    def use_ubatching(self) -> bool:
        """Whether batches are cut into micro-batches."""
        return self.enable_dbo or self.ubatch_size > 1

    @property
    def num_ubatches(self) -> int:
        """Micro-batches of a batch."""
        return 2 if self.enable_dbo else self.ubatch_size

    @property
    def use_sequence_parallel_moe(self) -> bool:
        """Whether the TP ranks of a replica bring different tokens to the experts."""
        is_wide = self.tensor_parallel_size > 1 and self.data_parallel_size > 1
        by_sequence = self.all2all_backend in parallel_rules.SEQUENCE_PARALLEL_BACKENDS
        return by_sequence and self.enable_expert_parallel and is_wide

    @property
    def use_all2all(self) -> bool:
        """Whether tokens travel between ranks to reach experts."""
        across_context = self.enable_expert_parallel and self.prefill_context_parallel_size > 1
        return self.data_parallel_size > 1 or self.use_sequence_parallel_moe or across_context

    @property
    def nnodes_within_dp(self) -> int:
        """Nodes of one replica."""
        return parallel_rules.nodes_of_replica(self)

    @property
    def node_rank_within_dp(self) -> int:
        """This node among those of its replica."""
        return self.node_rank % self.nnodes_within_dp

    @property
    def local_world_size(self) -> int:
        """Ranks of a replica on one node."""
        return self.world_size // self.nnodes_within_dp

    def compute_hash(self) -> str:
        """A hex string, the same for configs of one computation wherever it runs, and else another.

        Ports, ranks, addresses and what starts processes do not count; see `parallel_rules.PLACEMENT`.

        Raises:
            ConfigError: when a field was set to what no config has.
        """
        named = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in parallel_rules.PLACEMENT
        }
        try:
            return hashlib.sha256(msgspec.json.encode(named, order="deterministic")).hexdigest()
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"a field was set to what has no hash: {error}") from error

    def get_next_dp_init_port(self) -> int:
        """`data_parallel_master_port`, which moves on: to the next port that is kept, else by one.

        Raises:
            ConfigError: when there is none, or none left.
        """
        port = self.data_parallel_master_port
        if not 0 < port < 65536:
            raise ConfigError(
                f"data_parallel_master_port={port} is no port to meet at; set it or TCOMM_DP_MASTER_PORT"
            )
        kept = self._data_parallel_master_port_list
        self.data_parallel_master_port = kept.pop(0) if kept else port + 1
        return port

    def stateless_init_dp_group(self) -> dist.ProcessGroup:
        """A group of gloo over the replicas, apart from torch's own. **Collective** over them.

        Where rank 0 finds its port taken it tries the next one, up to five of them. The others cannot know,
        and run into their deadline; a port that was kept for the group is not taken.

        Raises:
            OSError: when they all are.
            RendezvousError: when replicas are missing.
        """
        from tcomm.groups.stateless.gloo import stateless_init_torch_distributed_process_group

        tried = 0
        while True:
            port = self.get_next_dp_init_port()
            tried += 1
            try:
                group = stateless_init_torch_distributed_process_group(
                    self.data_parallel_master_ip,
                    port,
                    self.data_parallel_rank,
                    self.data_parallel_size,
                    backend="gloo",
                )
                return cast(dist.ProcessGroup, group)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or tried == _TRIES:
                    raise
                logger.warning("data parallel port %d is taken; trying the next one", port)

    @staticmethod
    def has_unfinished_dp(dp_group: dist.ProcessGroup, has_unfinished: bool) -> bool:
        """Whether any replica has work left. **Collective** over the group, which needs a CPU backend."""
        flag = torch.tensor([has_unfinished], dtype=torch.int32, device="cpu")
        dist.all_reduce(flag, dist.ReduceOp.MAX, dp_group)
        return bool(flag.item())

    @staticmethod
    def sync_dp_state(
        dp_group: dist.ProcessGroup, has_unfinished: bool, pending_pause: bool
    ) -> tuple[bool, bool]:
        """Whether there is work left anywhere, and whether all replicas want to pause. **Collective**.

        Where some want to pause and others do not yet, there is work left: that of coming to an agreement.
        """
        flags = torch.tensor([has_unfinished, pending_pause], dtype=torch.int32, device="cpu")
        dist.all_reduce(flags, dist.ReduceOp.SUM, dp_group)
        unfinished, pausing = flags.tolist()
        agreed = pausing == dp_group.size()
        return unfinished > 0 or (pausing > 0 and not agreed), agreed

    @staticmethod
    def sync_kv_cache_memory_size(dp_group: dist.ProcessGroup, kv_cache_memory: int) -> int:
        """The least bytes of any replica; -1 is no limit, and the largest int64 where all say so.

        **Collective** over the group, which needs a CPU backend.

        Raises:
            ConfigError: when `kv_cache_memory` is no number of bytes; nothing was sent.
        """
        if type(kv_cache_memory) is not int or not -1 <= kv_cache_memory <= _NO_LIMIT:
            raise ConfigError(
                f"kv_cache_memory={kv_cache_memory!r} is no number of bytes; give one, or -1 for no limit"
            )
        least = _NO_LIMIT if kv_cache_memory == -1 else kv_cache_memory
        nbytes = torch.tensor([least], dtype=torch.int64, device="cpu")
        dist.all_reduce(nbytes, dist.ReduceOp.MIN, dp_group)
        return int(nbytes.item())
