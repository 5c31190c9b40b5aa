"""The current `ParallelState`, as functions: what code written for vllm.distributed calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from tcomm.config import EngineConfig
from tcomm.errors import UsageError
from tcomm.groups.graphs import GraphCaptureContext
from tcomm.groups.helpers.loggers import register_first_rank
from tcomm.groups.parallel.coordinator import GroupCoordinator
from tcomm.groups.parallel.current_config import current_parallel_config
from tcomm.groups.parallel.layouts import make_layout
from tcomm.groups.parallel.state import current

__all__ = [
    "ensure_model_parallel_initialized",
    "get_context_model_parallel_group",
    "get_dcp_group",
    "get_decode_context_model_parallel_rank",
    "get_decode_context_model_parallel_world_size",
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
    "init_model_parallel_group",
    "init_world_group",
    "initialize_model_parallel",
    "is_global_first_rank",
    "is_local_first_rank",
    "model_parallel_is_initialized",
    "patch_tensor_parallel_group",
    "prepare_communication_buffer_for_model",
    "set_custom_all_reduce",
]


def get_world_group() -> GroupCoordinator:
    """The group of all ranks.

    Raises:
        UsageError: "world group is not initialized".
    """
    return current().get_world()


def get_inner_dp_world_group() -> GroupCoordinator:
    """The group of one data parallel replica, where it spans several hosts.

    Raises:
        UsageError: "inner dp world group is not initialized".
    """
    return current().get_inner_dp_world()


def get_tp_group() -> GroupCoordinator:
    """The tensor parallel group.

    Raises:
        UsageError: "tensor model parallel group is not initialized".
    """
    return current().group("tp")


def get_dcp_group() -> GroupCoordinator:
    """The decode context parallel group.

    Raises:
        UsageError: "decode context model parallel group is not initialized".
    """
    return current().group("dcp")


get_context_model_parallel_group = get_dcp_group


def get_pcp_group() -> GroupCoordinator:
    """The prefill context parallel group.

    Raises:
        UsageError: "prefill context parallel group is not initialized".
    """
    return current().group("pcp")


def get_pp_group() -> GroupCoordinator:
    """The pipeline parallel group.

    Raises:
        UsageError: "pipeline model parallel group is not initialized".
    """
    return current().group("pp")


def get_dp_group() -> GroupCoordinator:
    """The data parallel group.

    Raises:
        UsageError: "data parallel group is not initialized".
    """
    return current().group("dp")


def get_ep_group() -> GroupCoordinator:
    """The expert parallel group.

    Raises:
        UsageError: "expert parallel group is not initialized. ..."; a config of a dense model makes none.
    """
    return current().group("ep")


def get_eplb_group() -> GroupCoordinator:
    """The group that balances experts, with the ranks of the expert parallel group.

    Raises:
        UsageError: "expert load balancing group is not initialized".
    """
    return current().group("eplb")


def get_tensor_model_parallel_world_size() -> int:
    """Ranks of the tensor parallel group."""
    return get_tp_group().world_size


def get_tensor_model_parallel_rank() -> int:
    """This rank in the tensor parallel group."""
    return get_tp_group().rank_in_group


def get_decode_context_model_parallel_world_size() -> int:
    """Ranks of the decode context parallel group."""
    return get_dcp_group().world_size


def get_decode_context_model_parallel_rank() -> int:
    """This rank in the decode context parallel group."""
    return get_dcp_group().rank_in_group


def get_pipeline_model_parallel_rank() -> int:
    """This rank in the pipeline parallel group."""
    return get_pp_group().rank_in_group


def get_node_count() -> int:
    """Number of hosts.

    Raises:
        UsageError: "distributed environment is not initialized".
    """
    count = current().node_count
    if count is None:
        raise UsageError("distributed environment is not initialized")
    return count


def init_world_group(ranks: list[int], local_rank: int, backend: str) -> GroupCoordinator:
    """A group of all ranks without a device communicator. **Collective.** It is not made the current one.

    Raises:
        UsageError: when `ranks` are not all ranks.
    """
    return GroupCoordinator(
        [ranks], local_rank, backend, False, group_name="world", timeout=current().timeout
    )


def init_model_parallel_group(
    group_ranks: list[list[int]],
    local_rank: int,
    backend: str,
    use_message_queue_broadcaster: bool = False,
    group_name: str | None = None,
    use_device_communicator: bool = True,
    use_all2all: bool = False,
) -> GroupCoordinator:
    """One of the groups that divide the world; arguments as of `GroupCoordinator`. **Collective.**

    It is not made a current one, and follows `set_custom_all_reduce`.
    """
    return GroupCoordinator(
        group_ranks,
        local_rank,
        backend,
        use_device_communicator,
        use_message_queue_broadcaster,
        group_name,
        use_all2all,
        use_kernels=current().use_kernels,
        timeout=current().timeout,
    )


def initialize_model_parallel(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    prefill_context_model_parallel_size: int = 1,
    decode_context_model_parallel_size: int | None = 1,
    backend: str | None = None,
) -> None:
    """Make the TP, DCP, PCP, PP, DP and EP groups of the current state. **Collective.**

    The data parallel size is that of the current config, 1 without one. All groups are made before any is
    published; when one fails, nothing has changed. A config of a dense model makes no EP group, and one with
    `enable_eplb` an EPLB group.

    Args:
        tensor_model_parallel_size: ranks that share a layer.
        pipeline_model_parallel_size: stages.
        prefill_context_model_parallel_size: ranks that share a prompt.
        decode_context_model_parallel_size: ranks that share a cache; None is 1.
        backend: of the device groups; None: as the world's.

    Raises:
        UsageError: when there is no world, or there are groups already.
        ConfigError: when the sizes do not fit one another or the world.
    """
    config = current_parallel_config()
    layout = make_layout(
        current().get_world().world_size,
        tp=tensor_model_parallel_size,
        pp=pipeline_model_parallel_size,
        pcp=prefill_context_model_parallel_size,
        dcp=decode_context_model_parallel_size,
        dp=1 if config is None else config.data_parallel_size,
    )
    current().init_model_parallel(
        layout,
        backend,
        with_experts=config is None or config.is_moe_model is not False,
        with_eplb=config is not None and config.enable_eplb,
        use_all2all=None if config is None else config.use_all2all,
    )


def ensure_model_parallel_initialized(
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    prefill_context_model_parallel_size: int = 1,
    decode_context_model_parallel_size: int | None = 1,
    backend: str | None = None,
) -> None:
    """`initialize_model_parallel`, or where that was done, a check that sizes are the same. **Collective.**

    Raises:
        UsageError: "... parallel group already initialized, but of unexpected size ..."
    """
    if not model_parallel_is_initialized():
        initialize_model_parallel(
            tensor_model_parallel_size,
            pipeline_model_parallel_size,
            prefill_context_model_parallel_size,
            decode_context_model_parallel_size,
            backend,
        )
        return
    wanted = {
        "tp": ("tensor parallel", tensor_model_parallel_size),
        "pp": ("pipeline parallel", pipeline_model_parallel_size),
        "pcp": ("prefill context parallel", prefill_context_model_parallel_size),
        "dcp": ("decode context parallel", decode_context_model_parallel_size or 1),
    }
    for kind, (name, size) in wanted.items():
        group = current().groups.get(kind)
        if group is not None and group.world_size != size:
            raise UsageError(
                f"{name} group already initialized, but of unexpected size: "
                f"{group.world_size}, and not {size}"
            )


def model_parallel_is_initialized() -> bool:
    """Whether there are a tensor and a pipeline parallel group."""
    return {"tp", "pp"} <= current().groups.keys()


def patch_tensor_parallel_group(
    tp_group: GroupCoordinator,
) -> contextlib.AbstractContextManager[None]:
    """Use another tensor parallel group inside, for a draft model with another degree, for example.

    Raises:
        UsageError: "Should not call when it's already patched", on entering.
    """
    return current().patched_tp(tp_group)


def set_custom_all_reduce(enable: bool) -> None:
    """Whether groups that are made from now on use tcomm's own algorithms, or torch.distributed alone.

    Raises:
        UsageError: when `enable` is no bool.
    """
    if not isinstance(enable, bool):
        raise UsageError(f"set_custom_all_reduce({enable!r}): give True or False")
    current().use_kernels = enable


def prepare_communication_buffer_for_model(model: torch.nn.Module) -> None:
    """Let every group make what the model's layers will need. **Collective** where a layer's is."""
    for group in current().groups.values():
        group.prepare_communication_buffer_for_model(model)


@contextlib.contextmanager
def graph_capture(device: torch.device) -> Iterator[GraphCaptureContext]:
    """Surround code that captures graphs in which the TP, PP or DP group is used. **Collective.**

    Args:
        device: to capture on. On a CPU nothing is captured and the code inside runs as it is.

    Yields:
        A context with the stream to capture on; None on a CPU.

    Raises:
        UsageError: when there are no groups.
    """
    used = [get_tp_group(), get_pp_group(), get_dp_group()]
    on_device = torch.device(device).type == "cuda"
    context = GraphCaptureContext(torch.cuda.Stream(device) if on_device else None)
    with contextlib.ExitStack() as stack:
        for group in used:
            context = stack.enter_context(group.graph_capture(context))
        yield context


def is_global_first_rank() -> bool:
    """Whether this is rank 0 of all; True in a single process, and where nothing can be found out."""
    try:
        world = current().world
        if world is not None:
            return world.is_first_rank
        return not dist.is_initialized() or dist.get_rank() == 0
    except Exception:  # noqa: BLE001  it decides what is logged, and must not break what is told
        return True


def is_local_first_rank() -> bool:
    """Whether this is the first rank of its host; True in a single process, and when in doubt."""
    try:
        world = current().world
        if world is not None:
            return world.local_rank == 0
        if not dist.is_initialized():
            return True
        known = EngineConfig.from_environment().local_rank
        return (dist.get_rank() if known is None else known) == 0
    except Exception:  # noqa: BLE001  as above
        return True


register_first_rank("global", is_global_first_rank)
register_first_rank("local", is_local_first_rank)
