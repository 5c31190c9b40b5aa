"""`vllm.distributed.utils`: arithmetic, stateless groups and their stores."""

from tcomm.groups.helpers.loggers import init_logger
from tcomm.groups.helpers.names import (
    get_tcp_uri,
    is_torch_equal_or_newer,
)
from tcomm.groups.helpers.output import suppress_stdout
from tcomm.groups.helpers.partition import (
    divide,
    ensure_divisibility,
    get_pp_indices,
    verify_group_size_divides_partition,
)
from tcomm.groups.helpers.scheduling import (
    USE_SCHED_YIELD,
    sched_yield,
)
from tcomm.groups.helpers.tensors import (
    is_weak_contiguous,
    split_tensor_along_last_dim,
)
from tcomm.groups.parallel.current_config import (
    get_cpu_distributed_timeout_or_none,
    get_distributed_timeout_or_none,
)
from tcomm.groups.stateless.cpu_all_reduce import cpu_all_reduce_
from tcomm.groups.stateless.gloo import (
    init_gloo_process_group,
    stateless_destroy_torch_distributed_process_group,
    stateless_init_torch_distributed_process_group,
)
from tcomm.groups.stateless.group import StatelessProcessGroup
from tcomm.groups.stateless.stores import (
    create_tcp_store,
    get_cached_tcp_store_client,
)
from tcomm.vllm.log import logger

__all__ = [
    "USE_SCHED_YIELD",
    "StatelessProcessGroup",
    "cpu_all_reduce_",
    "create_tcp_store",
    "divide",
    "ensure_divisibility",
    "get_cached_tcp_store_client",
    "get_cpu_distributed_timeout_or_none",
    "get_distributed_timeout_or_none",
    "get_pp_indices",
    "get_tcp_uri",
    "init_gloo_process_group",
    "init_logger",
    "is_torch_equal_or_newer",
    "is_weak_contiguous",
    "logger",
    "sched_yield",
    "split_tensor_along_last_dim",
    "stateless_destroy_torch_distributed_process_group",
    "stateless_init_torch_distributed_process_group",
    "suppress_stdout",
    "verify_group_size_divides_partition",
]
