import logging

import pytest
import torch

from tcomm.errors import CapabilityError, UsageError
from tcomm.groups.all2all import base, surroundings
from tcomm.groups.all2all.base import All2AllManagerBase
from tcomm.groups.all2all.surroundings import among
from tcomm.groups.stateless.group import StatelessProcessGroup


class Group:
    def __init__(self, rank_in_group, world_size):
        self.rank_in_group, self.world_size = rank_in_group, world_size


@pytest.fixture
def manager(monkeypatch):
    monkeypatch.setattr(surroundings, "_found_by", [])
    group = StatelessProcessGroup(rank=0, world_size=1, store=None, socket=None)
    with among({"dp": Group(1, 3), "tp": Group(0, 2)}):
        return All2AllManagerBase(group)


def test_its_place(manager):
    assert (manager.rank, manager.world_size, manager.internode) == (0, 1, False)
    assert (manager.dp_rank, manager.dp_world_size) == (1, 3)
    assert (manager.dp_group.world_size, manager.tp_group.world_size) == (3, 2)
    assert manager.tcp_store_group is None
    assert type(manager.cpu_group) is StatelessProcessGroup


def test_groups_may_come_later_and_are_kept(monkeypatch):
    monkeypatch.setattr(surroundings, "_found_by", [])
    store_group = object()
    group = StatelessProcessGroup(rank=0, world_size=1, store=None, socket=None)
    manager = All2AllManagerBase(group, store_group)
    assert manager.tcp_store_group is store_group
    for name in ("dp_group", "tp_group", "dp_rank", "dp_world_size"):
        with pytest.raises(UsageError, match=f"there is no {name[:2].upper()} group"):
            getattr(manager, name)
    with among({"dp": Group(0, 2)}):
        found = manager.dp_group
    with among({"dp": Group(0, 5)}):
        assert manager.dp_group is found


@pytest.mark.parametrize(
    ("method", "args", "instead"),
    [
        ("get_handle", ({},), "dispatch and combine"),
        ("dispatch", (torch.ones(1), torch.ones(1)), "get_handle"),
        ("dispatch_router_logits", (torch.ones(1), torch.ones(1)), "get_handle"),
        ("combine", (torch.ones(1),), "get_handle"),
        ("combine_into_output", (torch.ones(1), torch.ones(1)), "get_handle"),
        ("mask_remote_ranks", (), "a manager with support_fault_tolerance"),
    ],
)
def test_what_a_manager_does_not_offer(manager, method, args, instead):
    with pytest.raises(NotImplementedError, match=f"^All2AllManagerBase has no .*; use {instead}$") as caught:
        getattr(manager, method)(*args)
    assert isinstance(caught.value, CapabilityError)


class Doubling(All2AllManagerBase):
    given = None

    def dispatch(self, *args, **kwargs):
        self.given = args, kwargs
        return ()

    def combine(self, hidden_states, is_sequence_parallel=False, *, sizes=None):
        return hidden_states * 2


def test_methods_that_stand_on_others(manager):
    doubling = Doubling(manager.cpu_group)
    x, output = torch.ones(2, 3), torch.zeros(2, 3)
    assert doubling.combine_into_output(x, output) is output
    assert output.eq(2).all()
    with pytest.raises(UsageError, match="cannot take"):
        doubling.combine_into_output(x, torch.zeros(4, 2, 3))
    doubling.dispatch_router_logits(x, x, True, [x], sizes=[2])
    assert doubling.given == ((x, x, None, True, [x]), {"sizes": [2]})
    assert manager.allocate_combine_input((2, 3), x.dtype, x.device) is None


def test_nobody_is_left_out_where_faults_are_not_supported(manager):
    assert manager.support_fault_tolerance is False
    mask, fault = manager.query_active_mask(), manager.query_fault()
    assert (mask.tolist(), mask.dtype) == ([0], torch.int32)
    assert (fault.item(), fault.dtype, fault.shape) == (False, torch.bool, ())
    for method in ("clean_buffers", "stage_ep_size", "commit_ep_size", "destroy", "destroy"):
        assert getattr(manager, method)() is None
    assert manager.max_sms_used() is None
    assert manager.set_num_sms(10) is None


def test_a_checkpoint_is_told_once(manager, monkeypatch):
    lines = []
    monkeypatch.setattr(base, "_tell_no_checkpoint", lines.append)
    manager.checkpoint_prepare()
    manager.checkpoint_restore()
    assert lines == ["All2AllManagerBase"] * 2


def test_what_is_told_of_a_checkpoint(caplog):
    with caplog.at_level(logging.WARNING, "tcomm"):
        for _ in range(2):
            base._tell_no_checkpoint("Some")
    assert caplog.messages == ["Some keeps its memory over a checkpoint of the process"]
