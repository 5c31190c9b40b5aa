"""The manager of an expert group: made with it, chosen by what is exchanged, destroyed with it."""

import pytest
import torch
import torch.distributed as dist

from tcomm.errors import UsageError
from tcomm.groups.all2all.gather import AgRsAll2AllManager
from tcomm.groups.all2all.metadata import DPMetadata, use_metadata
from tcomm.groups.all2all.naive import NaiveAll2AllManager
from tcomm.groups.device import managed
from tcomm.groups.device.base import DeviceCommunicatorBase
from tests.groups.all2all.worlds import replicas, told

LAYER = {"max_tokens": 64, "hidden": 128, "topk": 2, "num_experts": 8}


def _made(member):
    with replicas(member, dp=2, backend="naive") as state:
        ep = state.groups["ep"]
        device, manager = ep.device_communicator, ep.device_communicator.all2all_manager
        x = torch.full((2, 3), float(member.rank))
        sizes = [2, 2]
        by_manager = manager.dispatch(x, x, sizes=sizes)[0]
        with use_metadata(DPMetadata(torch.tensor(2), torch.tensor([2, 2]))):
            by_group = ep.dispatch(x, -x, x.long())
            back = ep.combine(by_group[0])
        explained = device.explain_all2all(**LAYER)
        found = {
            "kind": type(manager) is NaiveAll2AllManager,
            "backend": device.all2all_backend,
            "ep is itself": manager._around["ep"] is device,
            "dp": manager.dp_group is state.groups["dp"],
            "rows": by_manager[:, 0].tolist(),
            "by group": (len(by_group), by_group[2].dtype, back[:, 0].tolist()),
            "same": device.all2all_for(**LAYER) is manager,
            "why": (explained.name, explained.reason),
            "others": [g.device_communicator.all2all_manager for g in (state.groups["dp"],)],
            "not known": told(ep.dispatch, x, x),
            "combine": told(ep.combine, x),
        }
        ended = []
        manager.destroy = lambda: ended.append(1)
        device.destroy()
        device.destroy()
        found["ended"] = (len(ended), device.all2all_manager)
        return found


def test_it_is_made_by_the_backends_name_and_ends_with_the_group(on_ranks):
    for rank, found in enumerate(on_ranks(2, _made)):
        assert found["kind"]
        assert found["ep is itself"]
        assert found["dp"]
        assert found["same"]
        assert found["backend"] == "naive"
        assert found["rows"] == [0.0, 0.0, 1.0, 1.0]
        assert found["by group"] == (3, torch.int64, [2.0 * rank, 2.0 * rank])
        assert found["why"] == ("naive", "'naive' was asked for by name")
        assert found["others"] == [None]
        assert "numbers of tokens are not known" in found["not known"][1]
        assert "numbers of tokens are not known" in found["combine"][1]
        assert found["ended"] == (1, None)


def _by_itself(member):
    """Chosen for each layer; the group has the manager that takes all until then."""
    with replicas(member, dp=2, backend="auto") as state:
        device = state.groups["ep"].device_communicator
        first = type(device.all2all_manager) is AgRsAll2AllManager
        # Ranks see different amounts of free memory, and go by the least.
        device._free_here = lambda: 10_000 if member.rank else 1 << 40
        seen = device.explain_all2all(**LAYER)
        manager = device.all2all_for(**LAYER)
        agreed = device.explain_all2all(**LAYER)
        refused = told(device.all2all_for, **{**LAYER, "topk": 0})
        same = manager is device.all2all_manager is device.all2all_for(**LAYER)
        return first, same, dict(seen.rejected), dict(agreed.rejected), refused


def test_it_is_chosen_where_it_is_to_be(on_ranks):
    for rank, (first, same, seen, agreed, refused) in enumerate(on_ranks(2, _by_itself)):
        assert first
        assert same
        assert ("10000 that are free" in seen["deepep_low_latency"]) == (rank == 1)
        assert "10000 that are free" in agreed["deepep_low_latency"]
        assert "topk=0 of an exchange" in refused[1]


def _group_alone(member):
    """An expert group without others around it, by the environment; and one that nobody asked for."""
    member.process_group()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TCOMM_ALL2ALL_BACKEND", "naive")
        device = DeviceCommunicatorBase(dist.group.WORLD, unique_name="ep:0", use_all2all=True, timeout=20)
        given = DeviceCommunicatorBase(
            dist.group.WORLD, unique_name="ep:1", use_all2all=True, all2all_backend="auto", timeout=20
        )
    x = torch.full((1, 2), float(device.rank))
    gathered, _ = device.all2all_manager.dispatch(x, x, True, sizes=[1, 1])
    unknown = told(
        DeviceCommunicatorBase, dist.group.WORLD, unique_name="ep:2", use_all2all=True, all2all_backend="rdma"
    )
    plain = DeviceCommunicatorBase(dist.group.WORLD, unique_name="ep:3", timeout=20)
    kept = plain.dispatch(x, x)[0] is x and plain.combine(x) is x
    found = (
        device.all2all_backend,
        given.all2all_backend,
        gathered[:, 0].tolist(),
        unknown,
        kept,
        told(plain.explain_all2all, **LAYER)[1],
        told(plain.all2all_for, **LAYER)[1],
    )
    for each in (device, given, plain):
        each.destroy()
    dist.destroy_process_group()
    return found


def test_a_group_by_the_environment_and_one_without(on_ranks):
    for backend, given, gathered, unknown, kept, explained, chosen in on_ranks(2, _group_alone):
        assert (backend, given, gathered, kept) == ("naive", "auto", [0.0, 1.0], True)
        assert "all2all backend 'rdma' is unknown; give one of" in unknown[1]
        assert explained == chosen
        assert explained.startswith("no tokens are exchanged through this group")


def test_a_world_of_one_exchanges_nothing():
    device = DeviceCommunicatorBase(None, unique_name="ep:0", use_all2all=True)
    x = torch.ones(2, 3)
    assert device.all2all_manager is None
    assert device.all2all_backend == "allgather_reducescatter"
    assert device.dispatch(x, x)[0] is x
    with pytest.raises(UsageError, match="one rank has nobody"):
        device.all2all_for(**LAYER)
    device.destroy()


class _Faulty:
    def __init__(self, ended):
        self.ended = ended

    def destroy(self):
        self.ended.append(self)
        raise OSError("cannot")


def test_all_managers_end_also_where_one_raises():
    ended = []
    device = DeviceCommunicatorBase(None, unique_name="ep:0", use_all2all=True)
    device.all2all_manager, device._managers = _Faulty(ended), {"naive": _Faulty(ended)}
    with pytest.raises(OSError, match="cannot"):
        device.destroy()
    assert len(ended) == 2
    device.destroy()


def test_buffers_are_counted_by_the_environment(monkeypatch):
    monkeypatch.setenv("TCOMM_DEEPEP_BUFFER_SIZE_MB", "3")
    exchanged = managed.Exchanged(128, 7168, 8, 256, 8)
    found = managed._bytes_of_buffers(exchanged)
    assert found["deepep_high_throughput"] == 3 << 20
    assert found["deepep_low_latency"] == found["pplx"] == found["nixl_ep"] == 1908410496
