"""The names of `vllm.distributed` and what they take, as its users may rely on it.

A signature is written as Python would; `FACTORY` stands for a fresh empty container, `OTHER` for a default
that is not compared. `NAME` marks what is looked for and not called: constants, properties, loggers.
"""

from __future__ import annotations

NAME = ""
FACTORY = object()
OTHER = object()

SCALED_MATMUL = (
    "(A, B, A_scale, B_scale, reduce_op, orig_scatter_dim, scatter_dim_after_maybe_reshape, group_name,"
    " output_shape, bias=None, result_scale=None, out_dtype=None, use_fast_accum=False)"
)

PARALLEL_STATE = {
    "GraphCaptureContext": "(stream)",
    "TensorMetadata": "(device, dtype, size)",
    "all_gather": "(tensor, dim, world_size, group_name)",
    "all_gather_fake": "(tensor, dim, world_size, group_name)",
    "all_reduce": "(tensor, group_name)",
    "all_reduce_fake": "(tensor, group_name)",
    "cleanup_dist_env_and_memory": "(shutdown_ray=False)",
    "destroy_distributed_environment": "()",
    "destroy_model_parallel": "()",
    "direct_register_custom_op": (
        "(op_name, op_func, mutates_args=None, fake_impl=None, target_lib=None, dispatch_key=None, tags=())"
    ),
    "ensure_model_parallel_initialized": (
        "(tensor_model_parallel_size, pipeline_model_parallel_size, prefill_context_model_parallel_size=1,"
        " decode_context_model_parallel_size=1, backend=None)"
    ),
    "get_context_model_parallel_group": "()",
    "get_dcp_group": "()",
    "get_decode_context_model_parallel_rank": "()",
    "get_decode_context_model_parallel_world_size": "()",
    "get_distributed_init_method": "(ip, port)",
    "get_dp_group": "()",
    "get_ep_group": "()",
    "get_inner_dp_world_group": "()",
    "get_node_count": "()",
    "get_pcp_group": "()",
    "get_pp_group": "()",
    "get_tensor_model_parallel_rank": "()",
    "get_tensor_model_parallel_world_size": "()",
    "get_tp_group": "()",
    "get_world_group": "()",
    "graph_capture": "(device)",
    "in_the_same_node_as": "(pg, source_rank=0)",
    "init_distributed_environment": (
        "(world_size=-1, rank=-1, distributed_init_method='env://', local_rank=-1, backend='nccl',"
        " timeout=None)"
    ),
    "init_logger": "(name)",
    "init_model_parallel_group": (
        "(group_ranks, local_rank, backend, use_message_queue_broadcaster=False, group_name=None,"
        " use_device_communicator=True)"
    ),
    "init_world_group": "(ranks, local_rank, backend)",
    "initialize_model_parallel": (
        "(tensor_model_parallel_size=1, pipeline_model_parallel_size=1,"
        " prefill_context_model_parallel_size=1, decode_context_model_parallel_size=1, backend=None)"
    ),
    "is_global_first_rank": "()",
    "is_local_first_rank": "()",
    "logger": NAME,
    "model_parallel_is_initialized": "()",
    "patch_tensor_parallel_group": "(tp_group)",
    "patched_fused_scaled_matmul_reduce_scatter": SCALED_MATMUL,
    "patched_fused_scaled_matmul_reduce_scatter_fake": SCALED_MATMUL,
    "prepare_communication_buffer_for_model": "(model)",
    "reduce_scatter": "(tensor, dim, world_size, group_name)",
    "reduce_scatter_fake": "(tensor, dim, world_size, group_name)",
    "resolve_obj_by_qualname": "(qualname)",
    "set_custom_all_reduce": "(enable)",
    "supports_custom_op": "()",
    "suppress_stdout": "()",
}

DISPATCH = (
    "(self, hidden_states, router_logits, topk_ids=None, is_sequence_parallel=False, extra_tensors=None)"
)
"""Of two versions at once; without `topk_ids`, the older one's places of the last two count too."""

DISPATCH_ROUTER_LOGITS = (
    "(self, hidden_states, router_logits, is_sequence_parallel=False, extra_tensors=None)"
)

COORDINATOR = {
    "GroupCoordinator": (
        "(group_ranks, local_rank, torch_distributed_backend, use_device_communicator,"
        " use_message_queue_broadcaster=False, group_name=None)"
    ),
    "GroupCoordinator.first_rank": NAME,
    "GroupCoordinator.last_rank": NAME,
    "GroupCoordinator.is_first_rank": NAME,
    "GroupCoordinator.is_last_rank": NAME,
    "GroupCoordinator.next_rank": NAME,
    "GroupCoordinator.prev_rank": NAME,
    "GroupCoordinator.all_reduce": "(self, input_)",
    "GroupCoordinator.all_gather": "(self, input_, dim=-1)",
    "GroupCoordinator.all_gatherv": "(self, input_, dim=0, sizes=None)",
    "GroupCoordinator.reduce_scatter": "(self, input_, dim=-1)",
    "GroupCoordinator.reduce_scatterv": "(self, input_, dim=-1, sizes=None)",
    "GroupCoordinator.gather": "(self, input_, dst=0, dim=-1)",
    "GroupCoordinator.broadcast": "(self, input_, src=0)",
    "GroupCoordinator.send": "(self, tensor, dst=None)",
    "GroupCoordinator.recv": "(self, size, dtype, src=None)",
    "GroupCoordinator.barrier": "(self)",
    "GroupCoordinator.dispatch": DISPATCH,
    "GroupCoordinator.dispatch_router_logits": DISPATCH_ROUTER_LOGITS,
    "GroupCoordinator.combine": "(self, hidden_states, is_sequence_parallel=False)",
    "GroupCoordinator.prepare_communication_buffer_for_model": "(self, model)",
    "GroupCoordinator.broadcast_object": "(self, obj=None, src=0)",
    "GroupCoordinator.broadcast_object_list": "(self, obj_list, src=0, group=None)",
    "GroupCoordinator.send_object": "(self, obj, dst)",
    "GroupCoordinator.recv_object": "(self, src)",
    "GroupCoordinator.broadcast_tensor_dict": (
        "(self, tensor_dict=None, src=0, group=None, metadata_group=None)"
    ),
    "GroupCoordinator.send_tensor_dict": (
        "(self, tensor_dict, dst=None, all_gather_group=None, all_gather_tensors=None)"
    ),
    "GroupCoordinator.recv_tensor_dict": "(self, src=None, all_gather_group=None, all_gather_tensors=None)",
    "GroupCoordinator.create_mq_broadcaster": (
        "(self, writer_rank=0, external_writer_handle=None, blocking=True)"
    ),
    "GroupCoordinator.create_single_reader_mq_broadcasters": (
        "(self, reader_rank_in_group=0, blocking=False)"
    ),
    "GroupCoordinator.graph_capture": "(self, graph_capture_context=None)",
    "GroupCoordinator.destroy": "(self)",
}

COMMUNICATION_OP = {
    "broadcast_tensor_dict": "(tensor_dict=None, src=0)",
    "tensor_model_parallel_all_gather": "(input_, dim=-1)",
    "tensor_model_parallel_all_reduce": "(input_)",
    "tensor_model_parallel_gather": "(input_, dst=0, dim=-1)",
    "tensor_model_parallel_reduce_scatter": "(input_, dim=-1)",
}

STATELESS = {
    "StatelessProcessGroup": (
        "(rank, world_size, store, socket, data_expiration_seconds=3600, send_dst_counter=FACTORY,"
        " recv_src_counter=FACTORY, broadcast_send_counter=0, broadcast_recv_src_counter=FACTORY,"
        " entries=FACTORY)"
    ),
    "StatelessProcessGroup.__post_init__": "(self)",
    "StatelessProcessGroup.all_gather_obj": "(self, obj)",
    "StatelessProcessGroup.barrier": "(self, timeout=30.0)",
    "StatelessProcessGroup.broadcast_obj": "(self, obj, src)",
    "StatelessProcessGroup.create": (
        "(host, port, rank, world_size, data_expiration_seconds=3600, store_timeout=300)"
    ),
    "StatelessProcessGroup.expire_data": "(self)",
    "StatelessProcessGroup.recv_obj": "(self, src)",
    "StatelessProcessGroup.send_obj": "(self, obj, dst)",
    "StatelessProcessGroup.broadcast": "(self, tensor, src)",
    "StatelessProcessGroup.send": "(self, tensor, dst)",
    "StatelessProcessGroup.recv": "(self, tensor, src)",
    "StatelessProcessGroup.all_reduce": "(self, tensor, op=OTHER)",
}

UTILS = {
    **STATELESS,
    "USE_SCHED_YIELD": NAME,
    "divide": "(numerator, denominator)",
    "ensure_divisibility": "(numerator, denominator)",
    "get_pp_indices": "(num_hidden_layers, pp_rank, pp_size)",
    "get_tcp_uri": "(ip, port)",
    "init_gloo_process_group": "(prefix_store, group_rank, group_size, timeout)",
    "init_logger": "(name)",
    "is_torch_equal_or_newer": "(target)",
    "logger": NAME,
    "sched_yield": "()",
    "split_tensor_along_last_dim": "(tensor, num_partitions, contiguous_split_chunks=False)",
    "stateless_destroy_torch_distributed_process_group": "(pg)",
    "stateless_init_torch_distributed_process_group": "(host, port, rank, world_size, backend)",
    "suppress_stdout": "()",
}


def _device_communicator(name: str) -> dict[str, str]:
    """A class that has what `DeviceCommunicatorBase` has."""
    methods = {
        "all_gather": "(self, input_, dim=-1)",
        "all_gatherv": "(self, input_, dim=0, sizes=None)",
        "all_reduce": "(self, input_)",
        "combine": "(self, hidden_states, is_sequence_parallel=False)",
        "destroy": "(self)",
        "dispatch": DISPATCH,
        "dispatch_router_logits": DISPATCH_ROUTER_LOGITS,
        "gather": "(self, input_, dst=0, dim=-1)",
        "prepare_communication_buffer_for_model": "(self, model)",
        "recv": "(self, size, dtype, src=None)",
        "reduce_scatter": "(self, input_, dim=-1)",
        "reduce_scatterv": "(self, input_, dim=-1, sizes=None)",
        "send": "(self, tensor, dst=None)",
    }
    return {
        name: "(cpu_group, device=None, device_group=None, unique_name='')",
        **{f"{name}.{method}": signature for method, signature in methods.items()},
    }


MESSAGE_QUEUE = {
    "Handle": NAME,
    "ShmRingBuffer": "(n_reader, max_chunk_bytes, max_chunks, name=None)",
    "ShmRingBuffer.get_data": "(self, current_idx)",
    "ShmRingBuffer.get_metadata": "(self, current_idx)",
    "ShmRingBuffer.handle": "(self)",
    "MessageQueue": (
        "(n_reader, n_local_reader, local_reader_ranks=None, max_chunk_bytes=25165824, max_chunks=10,"
        " connect_ip=None)"
    ),
    "MessageQueue.acquire_read": "(self, timeout=None, cancel=None, indefinite=False)",
    "MessageQueue.acquire_write": "(self, timeout=None)",
    "MessageQueue.broadcast_object": "(self, obj=None)",
    "MessageQueue.create_from_handle": "(handle, rank)",
    "MessageQueue.create_from_process_group": (
        "(pg, max_chunk_bytes, max_chunks, writer_rank=0, external_writer_handle=None, blocking=True)"
    ),
    "MessageQueue.create_from_process_group_single_reader": (
        "(pg, max_chunk_bytes, max_chunks, reader_rank=0, blocking=False)"
    ),
    "MessageQueue.dequeue": "(self, timeout=None, cancel=None, indefinite=False)",
    "MessageQueue.enqueue": "(self, obj, timeout=None)",
    "MessageQueue.export_handle": "(self)",
    "MessageQueue.wait_until_ready": "(self)",
}

MANAGER_DISPATCH = (
    "(self, hidden_states, topk_weights=None, topk_ids=None, is_sequence_parallel=False, extra_tensors=None)"
)
"""Of two versions at once, as `DISPATCH`."""


def _manager(name: str, **methods: str) -> dict[str, str]:
    """A class that has what `All2AllManagerBase` has, and more."""
    common = {
        "get_handle": "(self, kwargs)",
        "dispatch": MANAGER_DISPATCH,
        "dispatch_router_logits": DISPATCH_ROUTER_LOGITS,
        "combine": "(self, hidden_states, is_sequence_parallel=False)",
        "set_num_sms": "(self, num_sms)",
        "max_sms_used": "(self)",
        "destroy": "(self)",
        **methods,
    }
    return {
        name: "(cpu_group, tcp_store_group=None)",
        **{f"{name}.{method}": signature for method, signature in common.items()},
    }


ALL2ALL = {
    "Cache": "()",
    "Cache.get_or_create": "(self, kwargs, func)",
    **_manager(
        "All2AllManagerBase",
        query_active_mask="(self)",
        query_fault="(self)",
        clean_buffers="(self)",
        stage_ep_size="(self)",
        commit_ep_size="(self)",
        mask_remote_ranks="(self)",
    ),
    **_manager("AgRsAll2AllManager"),
    **_manager(
        "NaiveAll2AllManager", naive_multicast="(self, x, cu_tokens_across_sp_cpu, is_sequence_parallel)"
    ),
    **_manager("DeepEPAll2AllManagerBase"),
    **_manager("DeepEPHTAll2AllManager", _make_all2all_kwargs="(self)"),
    **_manager(
        "DeepEPLLAll2AllManager",
        _make_all2all_kwargs=(
            "(self, max_num_tokens_per_dp_rank, token_hidden_size, num_ep_ranks, num_global_experts,"
            " num_local_experts)"
        ),
    ),
    **_manager("NixlEPAll2AllManager"),
    **_manager("PPLXAll2AllManager"),
    **_manager(
        "FlashInferNVLinkTwoSidedManager",
        cleanup="(self)",
        ensure_alltoall_workspace_initialized="(self)",
        initialize="(self, world_size, rank, gpus_per_node)",
        combine=NAME,
    ),
    **_manager(
        "FlashInferNVLinkOneSidedManager",
        cleanup="(self)",
        initialize="(self, max_num_tokens, top_k, num_experts, hidden_size)",
    ),
    "FlashInferAllToAllManager": NAME,
}

PARALLEL_CONFIG = {
    "ParallelConfig.__post_init__": "(self)",
    "ParallelConfig._verify_args": "(self)",
    "ParallelConfig.compute_hash": "(self)",
    "ParallelConfig.get_next_dp_init_port": "(self)",
    "ParallelConfig.has_unfinished_dp": "(dp_group, has_unfinished)",
    "ParallelConfig.stateless_init_dp_group": "(self)",
    "ParallelConfig.sync_kv_cache_memory_size": "(dp_group, kv_cache_memory)",
    "ParallelConfig.use_ray": NAME,
    "ParallelConfig.world_size_across_dp": NAME,
}

_WEIGHT = "weight, num_replicas, num_groups, num_nodes"
REBALANCE = {
    "rebalance_experts": f"({_WEIGHT}, num_gpus)",
    "compute_logical_maps": "(phy2log, num_logical_experts)",
}
_PLAN = {
    f"{policy}EplbPolicy.rebalance_experts": f"(cls, {_WEIGHT}, num_ranks, old_global_expert_indices=None)"
    for policy in ("Abstract", "Default")
}

_MAPS = "old_global_expert_indices, new_global_expert_indices, expert_weights"
_LAYER_MAPS = "num_local_experts, old_indices, new_indices"
MOVING = {
    "MigrationFlow": "(src_rank, dst_rank, expert_ids)",
    "RecvMetadata": "(recv_primary_mask, recv_count, recv_expert_ids, recv_dst_rows)",
    "TransferMetadata": NAME,
    "get_ep_ranks_with_experts_batch": "(expert_ids, num_local_experts, old_indices, new_indices)",
    "move_from_buffer": (
        "(expert_weights, expert_weights_buffers, is_unchanged, is_received_locally, recv_metadata,"
        " new_indices, ep_rank)"
    ),
    "move_to_buffer": f"({_LAYER_MAPS}, expert_weights, expert_weights_buffers, cuda_stream, ep_group)",
    "rearrange_expert_weights_inplace": f"({_MAPS}, ep_group, is_profile=False, rank_mapping=None)",
    "schedule_migration_batches": f"({_LAYER_MAPS})",
    "schedule_migration_batches_for_layers": f"({_LAYER_MAPS})",
    "transfer_layer": (
        f"({_MAPS}, expert_weights_buffer, ep_group, is_profile=False, layer=0, cuda_stream=None,"
        " rank_mapping=None)"
    ),
}
EPLB_COMMUNICATOR = {
    "EplbCommunicator.add_recv": "(self, tensors, src_rank, expert_id)",
    "EplbCommunicator.add_send": "(self, tensors, dst_rank, expert_id)",
    "EplbCommunicator.execute": "(self)",
    "EplbCommunicator.needs_profile_buffer_reservation": NAME,
    "EplbCommunicator.set_stream": "(self, stream)",
    "EplbCommunicator.set_transfer_context": "(self, old_indices, layer_idx)",
    "create_eplb_communicator": "(group_coordinator, backend, expert_weights, expert_buffer=OTHER)",
}

EPLB = {
    **PARALLEL_CONFIG,
    **STATELESS,
    "EPLBConfig": NAME,
    "get_ep_group": "()",
    "get_node_count": "()",
    "in_the_same_node_as": "(pg, source_rank=0)",
    "init_logger": "(name)",
}

_JOINING = "global_expert_load=None, old_global_expert_indices=None, rank_mapping=None"
EPLB_STATE = {
    "EplbState": NAME,
    **{
        f"EplbState.{name}": NAME
        for name in (
            "expert_load_pass",
            "expert_load_window",
            "logical_replica_count",
            "logical_to_physical_map",
            "physical_to_logical_map",
        )
    },
    "EplbState.add_model": f"(self, model, model_config, {_JOINING})",
    "EplbState.build": f"(cls, model, device, parallel_config, {_JOINING})",
    "EplbState.build_initial_global_physical_to_logical_map": "(num_routed_experts, num_redundant_experts)",
    "EplbState.drain_async": "(self)",
    "EplbState.get_eep_state": "(cls, parallel_config)",
    "EplbState.prepare_forward": "(self, model_config, num_unpadded_tokens, ubatch_slices=None)",
    "EplbState.rearrange": (
        "(self, model=OTHER, is_profile=False, execute_shuffle=True, global_expert_load=None,"
        " rank_mapping=None)"
    ),
    "EplbState.recv_state": "()",
    "EplbState.start_async_loop": "(self, rank_mapping=None, is_profile=False)",
    "EplbState.step": "(self, model=OTHER, is_dummy=False, is_profile=False, log_stats=False)",
    "EplbState.validate_ep_configuration": "(self, new_model)",
    "EplbLayerState": NAME,
    "EplbModelState": NAME,
    "EplbStats": "(global_expert_load_window, num_replicas, num_groups, num_nodes, num_gpus)",
    "MixtureOfExperts": NAME,
    "MixtureOfExperts.set_eplb_state": (
        "(self, expert_load_view, logical_to_physical_map, logical_replica_count)"
    ),
}

SIGNATURES: dict[str, dict[str, str]] = {
    "parallel_state": {**PARALLEL_STATE, **COORDINATOR, "StatelessProcessGroup": NAME},
    "communication_op": COMMUNICATION_OP,
    "utils": UTILS,
    "device_communicators.base_device_communicator": _device_communicator("DeviceCommunicatorBase"),
    "device_communicators.cuda_communicator": _device_communicator("CudaCommunicator"),
    "device_communicators.cpu_communicator": _device_communicator("CpuCommunicator"),
    "device_communicators.shm_broadcast": MESSAGE_QUEUE,
    "device_communicators.all2all": ALL2ALL,
    "eplb.async_worker": {"start_async_worker": "(state, rank_mapping=None, is_profile=False)"},
    "eplb": {
        "rearrange_expert_weights_inplace": MOVING["rearrange_expert_weights_inplace"],
        **EPLB,
        **REBALANCE,
        **EPLB_STATE,
    },
    "eplb.eplb_state": EPLB_STATE,
    "eplb.rebalance_algo": REBALANCE,
    "eplb.rebalance_execute": MOVING,
    "eplb.eplb_communicator": EPLB_COMMUNICATOR,
    "eplb.policy": {"EPLB_POLICIES": NAME, "AbstractEplbPolicy": NAME, "DefaultEplbPolicy": NAME, **_PLAN},
    "": {
        **PARALLEL_STATE,
        **COORDINATOR,
        **COMMUNICATION_OP,
        **UTILS,
        "DeviceCommunicatorBase": NAME,
    },
}
"""Module below `tcomm.vllm` -> name -> signature."""

PARALLEL_CONFIG_FIELDS = {
    "_api_process_count": 1,
    "_api_process_rank": 0,
    "all2all_backend": "allgather_reducescatter",
    "cp_kv_cache_interleave_size": 1,
    "data_parallel_backend": "mp",
    "data_parallel_external_lb": False,
    "data_parallel_hybrid_lb": False,
    "data_parallel_master_ip": "127.0.0.1",
    "data_parallel_master_port": 29500,
    "data_parallel_rank": 0,
    "data_parallel_rank_local": None,
    "data_parallel_rpc_port": 29550,
    "data_parallel_size": 1,
    "data_parallel_size_local": 1,
    "dbo_decode_token_threshold": 32,
    "dbo_prefill_token_threshold": 512,
    "dcp_kv_cache_interleave_size": 1,
    "decode_context_parallel_size": 1,
    "disable_custom_all_reduce": False,
    "disable_nccl_for_dp_synchronization": None,
    "distributed_executor_backend": None,
    "enable_dbo": False,
    "enable_eplb": False,
    "enable_expert_parallel": False,
    "enable_multimodal_encoder_data_parallel": False,
    "eplb_log_balancedness": False,
    "eplb_step_interval": 3000,
    "eplb_window_size": 1000,
    "expert_placement_strategy": "linear",
    "is_moe_model": None,
    "master_addr": "127.0.0.1",
    "master_port": 29501,
    "max_parallel_loading_workers": None,
    "nnodes": 1,
    "node_rank": 0,
    "num_redundant_experts": 0,
    "pipeline_parallel_size": 1,
    "placement_group": None,
    "prefill_context_parallel_size": 1,
    "rank": 0,
    "ray_runtime_env": None,
    "ray_workers_use_nsight": False,
    "sd_worker_cls": "auto",
    "tensor_parallel_size": 1,
    "ubatch_size": 0,
    "worker_cls": "auto",
    "worker_extension_cls": "",
}
"""Arguments of `ParallelConfig`, older and newer, and their defaults."""

EPLB_CONFIG_FIELDS = {
    "log_balancedness": False,
    "log_balancedness_interval": 1,
    "num_redundant_experts": 0,
    "policy": "default",
    "step_interval": 3000,
    "window_size": 1000,
}

LATER_ARGUMENTS = {
    "DeviceCommunicatorBase": {"global_ranks", "global_world_size", "use_all2all"},
    "GroupCoordinator": {"use_all2all"},
    "init_model_parallel_group": {"use_all2all"},
    "stateless_init_torch_distributed_process_group": {
        "group_name", "listen_socket", "return_store", "timeout",
    },
    "StatelessProcessGroup.create": {"listen_socket"},
    "MessageQueue.wait_until_ready": {"timeout"},
    "FlashInferNVLinkOneSidedManager.initialize": {"extra_nbytes_per_token"},
}  # fmt: skip
"""What newer versions of it, or we, take in addition, behind all that is listed above."""
