import gc

import pytest
import torch

from tcomm.groups.all2all import deep_ep
from tcomm.groups.all2all.deep_ep import (
    DeepEPAll2AllManagerBase,
    DeepEPHTAll2AllManager,
    DeepEPLLAll2AllManager,
)
from tcomm.groups.moe.buffer import Buffer
from tcomm.groups.stateless.group import StatelessProcessGroup
from tests.groups.all2all.worlds import replicas

LAYER = {
    "max_num_tokens_per_dp_rank": 4,
    "token_hidden_size": 16,
    "num_ep_ranks": 2,
    "num_global_experts": 4,
    "num_local_experts": 2,
}


def _alone(kind):
    return kind(StatelessProcessGroup(rank=0, world_size=1, store=None, socket=None))


def test_arguments_of_the_high_throughput_buffer(monkeypatch):
    monkeypatch.setenv("TCOMM_DEEPEP_BUFFER_SIZE_MB", "2")
    manager = _alone(DeepEPHTAll2AllManager)
    wanted = {
        "group": manager.cpu_group,
        "num_nvl_bytes": 2 << 20,
        "num_rdma_bytes": 0,
        "low_latency_mode": False,
        "num_qps_per_rank": 1,
        "explicitly_destroy": True,
    }
    assert manager._make_all2all_kwargs() == wanted
    manager.internode = True
    assert manager._make_all2all_kwargs() == {**wanted, "num_rdma_bytes": 2 << 20, "num_qps_per_rank": 10}
    monkeypatch.setenv("VLLM_DEEPEP_HIGH_THROUGHPUT_FORCE_INTRA_NODE", "1")
    assert manager._make_all2all_kwargs() == wanted
    monkeypatch.delenv("TCOMM_DEEPEP_BUFFER_SIZE_MB")
    assert manager._make_all2all_kwargs()["num_nvl_bytes"] == 1024 << 20


def test_arguments_of_the_low_latency_buffer(monkeypatch):
    manager = _alone(DeepEPLLAll2AllManager)
    made = manager._make_all2all_kwargs(128, 7168, 8, 256, 32)
    assert made == {
        "group": manager.cpu_group,
        "num_nvl_bytes": 1 << 30,
        "num_rdma_bytes": 1908410496,
        "low_latency_mode": True,
        "num_qps_per_rank": 32,
        "allow_nvlink_for_low_latency_mode": True,
        "allow_mnnvl": False,
        "explicitly_destroy": True,
    }
    monkeypatch.setenv("TCOMM_DEEPEP_LOW_LATENCY_USE_MNNVL", "1")
    assert manager._make_all2all_kwargs(128, 7168, 8, 256, 32)["allow_mnnvl"] is True


def test_what_a_handle_is_made_with():
    manager = _alone(DeepEPHTAll2AllManager)
    with pytest.raises(AssertionError, match=r"expects no arguments.*Got \['hidden'\]"):
        manager.get_handle({"hidden": 3})
    with pytest.raises(TypeError, match="unexpected keyword argument 'more'"):
        _alone(DeepEPLLAll2AllManager).get_handle({**LAYER, "more": 1})
    with pytest.raises(NotImplementedError):
        _alone(DeepEPAll2AllManagerBase).get_handle({})
    for method in ("dispatch", "combine"):
        with pytest.raises(NotImplementedError, match="use get_handle"):
            getattr(manager, method)(torch.ones(1))


def test_processors_can_only_become_fewer(monkeypatch):
    monkeypatch.setattr(Buffer, "num_sms", 20)
    manager = _alone(DeepEPHTAll2AllManager)
    assert (manager.num_sms, manager.max_sms_used()) == (20, None)
    for given, wanted in ((10, 10), (64, 20)):
        manager.set_num_sms(given)
        assert Buffer.num_sms == wanted
    with pytest.raises(AssertionError, match="SM count must be even: 5"):
        manager.set_num_sms(5)
    manager = _alone(DeepEPLLAll2AllManager)
    manager.set_num_sms(4)
    assert (Buffer.num_sms, manager.max_sms_used()) == (20, 0)


class Made:
    destroyed = 0

    get_low_latency_rdma_size_hint = Buffer.get_low_latency_rdma_size_hint

    def __init__(self, group, **kwargs):
        self.group = group

    def destroy(self):
        self.destroyed += 1


def test_buffers_that_are_kept_are_destroyed_with_the_manager(monkeypatch):
    monkeypatch.setattr(deep_ep, "Buffer", Made)
    manager = _alone(DeepEPLLAll2AllManager)
    first, second = manager.get_handle(LAYER), manager.get_handle({**LAYER, "max_num_tokens_per_dp_rank": 8})
    assert manager.get_handle(dict(reversed(LAYER.items()))) is first
    assert second is not first
    assert first.group is manager.cpu_group
    del second
    gc.collect()
    manager.destroy()
    manager.destroy()
    assert first.destroyed == 1
    assert manager.handle_cache.alive() == []


def _layers(member):
    """Both managers, as a layer drives them."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TCOMM_DEEPEP_BUFFER_SIZE_MB", "1")
        with replicas(member, dp=2, backend="deepep_high_throughput") as state:
            device = state.groups["ep"].device_communicator
            manager = device.all2all_manager
            x, idx, weights = _inputs(member.rank)
            buffer = manager.get_handle({})
            per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, 4)
            rows, ids, got, _, handle, _ = buffer.dispatch(
                x, None, per_rank, None, in_rank, per_expert, idx, weights
            )
            factors = ((ids + 1 + 2 * member.rank) * got * (ids >= 0)).sum(1)
            combined = buffer.combine((rows * factors[:, None]).to(x.dtype), handle)[0]
            found.append((combined.float() - _dense(member.rank)).abs().max().item())
            found.append(manager.get_handle({}) is buffer)
            low = DeepEPLLAll2AllManager(state.groups["ep"].cpu_group)
            small = low.get_handle(LAYER)
            rows, _, handle, _, _ = small.low_latency_dispatch(x, idx, 4, 4, use_fp8=False)
            y = rows * (torch.arange(1, 3) + 2 * member.rank)[:, None, None]
            combined = small.low_latency_combine(y.to(x.dtype), idx, weights, handle)[0]
            found.append((combined.float() - _dense(member.rank)).abs().max().item())
            low.destroy()
            state.destroy()
            found.append(buffer._is_destroyed and small._is_destroyed)
    return found


def _inputs(rank):
    x = (torch.arange(3 * 16).reshape(3, 16) / 16 + rank).to(torch.bfloat16)
    idx = torch.tensor([[0, 3], [2, -1], [1, 0]])
    return x[: 3 - rank], idx[: 3 - rank], torch.tensor([[0.5, 0.25], [1.0, 0.0], [0.5, 2.0]])[: 3 - rank]


def _dense(rank):
    x, idx, weights = _inputs(rank)
    return x.float() * ((idx + 1) * weights * (idx >= 0)).sum(1)[:, None]


def test_a_layer_by_either(on_ranks):
    for high, same, low, destroyed in on_ranks(2, _layers):
        assert max(high, low) < 0.06
        assert same
        assert destroyed


class Masks:
    faults = ()
    cleaned = 0

    def __init__(self, *mask):
        self.mask = mask

    def query(self):
        return torch.tensor(self.mask, dtype=torch.int32)

    def clean(self):
        self.cleaned += 1


class Shrinking(Made):
    def __init__(self, group, **kwargs):
        self.found = [Masks(1), Masks(0)]

    def masks(self):
        return self.found


def test_ranks_that_buffers_lost(monkeypatch):
    monkeypatch.setattr(deep_ep, "Buffer", Shrinking)
    manager = _alone(DeepEPLLAll2AllManager)
    buffer = manager.get_handle(LAYER)
    assert "enable_shrink" not in manager._make_all2all_kwargs(**LAYER)
    assert (manager.query_active_mask().tolist(), manager.query_fault().item()) == ([0], False)
    manager.support_fault_tolerance = True
    assert manager._make_all2all_kwargs(**LAYER)["enable_shrink"] is True
    assert (manager.query_active_mask().tolist(), manager.query_fault().item()) == ([1], False)
    buffer.found[1].faults = ((3, (0,)),)
    assert (manager.query_fault().item(), manager.query_fault().dtype) == (True, torch.bool)
    manager.clean_buffers()
    assert [masks.cleaned for masks in buffer.found] == [1, 1]
