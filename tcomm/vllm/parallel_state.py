"""`vllm.distributed.parallel_state`: groups, their state, and ops for compiled graphs."""

from tcomm.groups.compiled.fused_matmul import (
    patched_fused_scaled_matmul_reduce_scatter,
    patched_fused_scaled_matmul_reduce_scatter_fake,
)
from tcomm.groups.compiled.library import direct_register_custom_op
from tcomm.groups.compiled.ops import (
    all_gather,
    all_gather_fake,
    all_reduce,
    all_reduce_fake,
    reduce_scatter,
    reduce_scatter_fake,
)
from tcomm.groups.device import DeviceCommunicatorBase
from tcomm.groups.graphs import GraphCaptureContext
from tcomm.groups.helpers.loggers import init_logger
from tcomm.groups.helpers.names import (
    get_distributed_init_method,
    resolve_obj_by_qualname,
    supports_custom_op,
)
from tcomm.groups.helpers.output import suppress_stdout
from tcomm.groups.parallel.coordinator import GroupCoordinator
from tcomm.groups.parallel.environment import (
    cleanup_dist_env_and_memory,
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
)
from tcomm.groups.parallel.lanes import Handle
from tcomm.groups.parallel.parallel_state import (
    ensure_model_parallel_initialized,
    get_context_model_parallel_group,
    get_dcp_group,
    get_decode_context_model_parallel_rank,
    get_decode_context_model_parallel_world_size,
    get_dp_group,
    get_ep_group,
    get_eplb_group,
    get_inner_dp_world_group,
    get_node_count,
    get_pcp_group,
    get_pipeline_model_parallel_rank,
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
    get_world_group,
    graph_capture,
    init_model_parallel_group,
    init_world_group,
    initialize_model_parallel,
    is_global_first_rank,
    is_local_first_rank,
    model_parallel_is_initialized,
    patch_tensor_parallel_group,
    prepare_communication_buffer_for_model,
    set_custom_all_reduce,
)
from tcomm.groups.parallel.tensor_dict_wire import TensorMetadata
from tcomm.groups.stateless.group import StatelessProcessGroup
from tcomm.groups.stateless.same_node import in_the_same_node_as
from tcomm.vllm.log import logger

__all__ = [
    "DeviceCommunicatorBase",
    "GraphCaptureContext",
    "GroupCoordinator",
    "Handle",
    "StatelessProcessGroup",
    "TensorMetadata",
    "all_gather",
    "all_gather_fake",
    "all_reduce",
    "all_reduce_fake",
    "cleanup_dist_env_and_memory",
    "destroy_distributed_environment",
    "destroy_model_parallel",
    "direct_register_custom_op",
    "ensure_model_parallel_initialized",
    "get_context_model_parallel_group",
    "get_dcp_group",
    "get_decode_context_model_parallel_rank",
    "get_decode_context_model_parallel_world_size",
    "get_distributed_init_method",
    "get_dp_group",
    "get_ep_group",
    "get_eplb_group",
    "get_inner_dp_world_group",
    "get_node_count",
    "get_pcp_group",
    "get_pipeline_model_parallel_rank",
    "get_pp_group",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "get_tp_group",
    "get_world_group",
    "graph_capture",
    "in_the_same_node_as",
    "init_distributed_environment",
    "init_logger",
    "init_model_parallel_group",
    "init_world_group",
    "initialize_model_parallel",
    "is_global_first_rank",
    "is_local_first_rank",
    "logger",
    "model_parallel_is_initialized",
    "patch_tensor_parallel_group",
    "patched_fused_scaled_matmul_reduce_scatter",
    "patched_fused_scaled_matmul_reduce_scatter_fake",
    "prepare_communication_buffer_for_model",
    "reduce_scatter",
    "reduce_scatter_fake",
    "resolve_obj_by_qualname",
    "set_custom_all_reduce",
    "supports_custom_op",
    "suppress_stdout",
]
