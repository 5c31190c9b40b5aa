import pytest
import torch
import torch.distributed as dist

from tcomm.errors import UsageError
from tcomm.groups.parallel import environment, parallel_state
from tcomm.groups.parallel.current_config import use_parallel_config
from tcomm.groups.parallel.parallel_config import ParallelConfig
from tcomm.groups.parallel.state import ParallelState, current, use
from tests.groups.parallel.engine import coordinator, engine, refusal

GETTERS = {
    "get_world_group": "world group is not initialized",
    "get_inner_dp_world_group": "inner dp world group is not initialized",
    "get_tp_group": "tensor model parallel group is not initialized",
    "get_dcp_group": "decode context model parallel group is not initialized",
    "get_context_model_parallel_group": "decode context model parallel group is not initialized",
    "get_pcp_group": "prefill context parallel group is not initialized",
    "get_pp_group": "pipeline model parallel group is not initialized",
    "get_dp_group": "data parallel group is not initialized",
    "get_ep_group": "expert parallel group is not initialized. EP group is only created for MoE models with "
    "num_experts > 0. This function should only be called for MoE models.",
    "get_eplb_group": "expert load balancing group is not initialized",
    "get_node_count": "distributed environment is not initialized",
    "get_tensor_model_parallel_rank": "tensor model parallel group is not initialized",
    "get_tensor_model_parallel_world_size": "tensor model parallel group is not initialized",
    "get_decode_context_model_parallel_rank": "decode context model parallel group is not initialized",
    "get_decode_context_model_parallel_world_size": "decode context model parallel group is not initialized",
    "get_pipeline_model_parallel_rank": "pipeline model parallel group is not initialized",
}


@pytest.mark.parametrize("name", GETTERS)
def test_what_was_not_made_is_told(name):
    with pytest.raises(AssertionError) as error:
        getattr(parallel_state, name)()
    assert str(error.value) == GETTERS[name]


def test_a_single_process_is_first():
    assert parallel_state.is_global_first_rank() is True
    assert parallel_state.is_local_first_rank() is True
    assert parallel_state.model_parallel_is_initialized() is False
    assert parallel_state.get_context_model_parallel_group is parallel_state.get_dcp_group


def _getters(member):
    with engine(member, tp=2, pp=2, dcp=2) as groups:
        assert groups.model_parallel_is_initialized()
        sizes = {
            name: getattr(groups, f"get_{name}_group")().world_size
            for name in ("world", "tp", "dcp", "context_model_parallel", "pcp", "pp", "dp", "ep")
        }
        ranks = (
            groups.get_tensor_model_parallel_rank(),
            groups.get_decode_context_model_parallel_rank(),
            groups.get_pipeline_model_parallel_rank(),
        )
        widths = (
            groups.get_tensor_model_parallel_world_size(),
            groups.get_decode_context_model_parallel_world_size(),
            groups.get_node_count(),
        )
        first = groups.is_global_first_rank(), groups.is_local_first_rank()
        groups.ensure_model_parallel_initialized(2, 2, 1, 2)
        told = [
            refusal(groups.ensure_model_parallel_initialized, *wanted)[1]
            for wanted in ((1, 2), (2, 1), (2, 2, 2), (2, 2, 1, 1))
        ]
        assert refusal(groups.initialize_model_parallel)[1].endswith("group is already initialized")
        assert refusal(groups.get_eplb_group)[0] == "UsageError"
        return sizes, ranks, widths, first, told


def test_groups_of_an_engine(on_ranks):
    for rank, (sizes, ranks, widths, first, told) in enumerate(on_ranks(4, _getters)):
        assert sizes == {
            "world": 4,
            "tp": 2,
            "dcp": 2,
            "context_model_parallel": 2,
            "pcp": 1,
            "pp": 2,
            "dp": 1,
            "ep": 2,
        }
        assert ranks == (rank % 2, rank % 2, rank // 2)
        assert widths == (2, 2, 1)
        assert first == (rank == 0, rank == 0)
        starts = [
            "tensor parallel",
            "pipeline parallel",
            "prefill context parallel",
            "decode context parallel",
        ]
        for text, start in zip(told, starts, strict=True):
            assert text.startswith(f"{start} group already initialized, but of unexpected size")


def _configured(member):
    """Data parallel replicas of a dense model, and of one with experts that are balanced."""
    member.process_group()
    found = []
    for is_moe in (False, True):
        config = ParallelConfig(
            data_parallel_size=2,
            data_parallel_rank=member.rank,
            is_moe_model=is_moe,
            enable_expert_parallel=is_moe,
            enable_eplb=is_moe,
            distributed_executor_backend="mp",
        )
        with use(ParallelState(timeout=20)) as state, use_parallel_config(config):
            environment.init_distributed_environment(backend="gloo")
            parallel_state.ensure_model_parallel_initialized(1, 1)
            found.append((parallel_state.get_dp_group().ranks, sorted(state.groups)))
            state.destroy()
    dist.destroy_process_group()
    return found


def test_the_current_config_decides_which_groups_there_are(on_ranks):
    dense = ["dcp", "dp", "pcp", "pp", "tp"]
    assert on_ranks(2, _configured) == [[([0, 1], dense), ([0, 1], sorted([*dense, "ep", "eplb"]))]] * 2


def _made(member):
    with engine(member, tp=2) as groups:
        groups.set_custom_all_reduce(False)
        plain = groups.init_model_parallel_group([[0, 1]], member.rank, "gloo", group_name="tp")
        groups.set_custom_all_reduce(True)
        own = groups.init_model_parallel_group([[0], [1]], member.rank, "gloo", True, None, False)
        world = groups.init_world_group([0, 1], member.rank, "gloo")
        by = [
            group.device_communicator.explain("all_reduce", nbytes=64).engine
            for group in (groups.get_tp_group(), plain)
        ]
        with groups.patch_tensor_parallel_group(plain):
            assert groups.get_tp_group() is plain
            nested = refusal(groups.patch_tensor_parallel_group(plain).__enter__)[1]
        found = own.world_size, world.unique_name.split(":")[0], world.device_communicator, own.unique_name
        for group in (plain, own, world):
            group.destroy()
        with groups.graph_capture(torch.device("cpu")) as context:
            assert context.stream is None
            total = groups.get_tp_group().all_reduce(torch.ones(1)).item()
        groups.prepare_communication_buffer_for_model(torch.nn.Sequential(FusedMoE()))
        return by, nested, found, total, FusedMoE.calls


class FusedMoE(torch.nn.Module):
    calls = 0

    def maybe_init_modular_kernel(self):
        FusedMoE.calls += 1


def test_groups_of_ones_own_and_the_switch_for_kernels(on_ranks):
    for by, nested, found, total, calls in on_ranks(2, _made):
        assert by[0] != "torch"
        assert by[1] == "torch"
        assert nested == "Should not call when it's already patched"
        assert found == (1, "world", None, "anonymous:0")
        assert (total, calls) == (2.0, 1)


@pytest.mark.parametrize("enable", ["no", None, 1])
def test_the_switch_is_on_or_off(enable):
    with pytest.raises(UsageError, match="give True or False"):
        parallel_state.set_custom_all_reduce(enable)


def test_capture_needs_groups():
    with pytest.raises(UsageError, match="tensor model parallel group is not initialized"):
        parallel_state.graph_capture(torch.device("cpu")).__enter__()


def test_sizes_that_do_not_fit_are_told_before_anything_is_made(on_ranks):
    assert on_ranks(2, _does_not_fit) == [("ConfigError", {})] * 2


def _does_not_fit(member):
    with coordinator(member, with_device=False) as group, use(ParallelState()) as state:
        state.world = group
        told = refusal(parallel_state.initialize_model_parallel, 3)
        return told[0], current().groups
