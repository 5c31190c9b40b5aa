import types

import pytest
import torch
import torch.distributed as dist

from tcomm.eplb.moving import creation
from tcomm.eplb.moving.creation import create_eplb_communicator, seconds_of
from tcomm.eplb.moving.torch_communicators import TorchGlooCommunicator, TorchNcclCommunicator
from tcomm.errors import ConfigError, NotOfferedError
from tcomm.groups.arguments import UNSET
from tcomm.groups.parallel.coordinator import GroupCoordinator
from tcomm.groups.stateless.group import StatelessProcessGroup

HOST = [torch.zeros(2)]
DEVICE = [types.SimpleNamespace(device=torch.device("cuda"))]


class Group(dist.ProcessGroup):
    """A group that says of itself which backends it has."""

    def __init__(self, config):
        super().__init__(0, 2)
        self.config = config


@pytest.fixture(autouse=True)
def backends(monkeypatch):
    monkeypatch.setattr(creation.dist, "get_backend_config", lambda group: group.config)


BOTH, ONLY_NCCL, ONLY_GLOO = (Group(c) for c in ("cpu:gloo,cuda:nccl", "cuda:nccl", "cpu:gloo,cuda:gloo"))


@pytest.mark.parametrize(
    ("group", "backend", "weights", "kind"),
    [
        (BOTH, None, HOST, TorchGlooCommunicator),
        (BOTH, None, DEVICE, TorchGlooCommunicator),
        (BOTH, "torch_gloo", DEVICE, TorchGlooCommunicator),
        (BOTH, "torch_nccl", DEVICE, TorchNcclCommunicator),
        (BOTH, "torch_nccl", HOST, TorchGlooCommunicator),
        (ONLY_NCCL, None, DEVICE, TorchNcclCommunicator),
        (ONLY_GLOO, None, DEVICE, TorchGlooCommunicator),
    ],
)
def test_a_backend_is_what_was_asked_for_or_suits(group, backend, weights, kind):
    made = create_eplb_communicator(group, backend, iter(weights), weights, timeout=7)
    assert type(made) is kind
    assert (made._group, made._seconds) == (group, 7)


def test_a_coordinator_gives_its_groups(monkeypatch):
    coordinator = object.__new__(GroupCoordinator)
    coordinator.cpu_group, coordinator.device_group, coordinator.world_size = ONLY_GLOO, ONLY_NCCL, 2
    assert create_eplb_communicator(coordinator, None, HOST)._group is ONLY_GLOO
    assert create_eplb_communicator(coordinator, "torch_nccl", DEVICE)._group is ONLY_NCCL


@pytest.mark.parametrize(
    ("group", "backend", "weights", "kind", "text"),
    [
        (BOTH, "mpi", HOST, ConfigError, "backend='mpi' of create_eplb_communicator is none of torch"),
        (BOTH, "pynccl", HOST, NotOfferedError, "pynccl is not offered here"),
        (BOTH, None, HOST + DEVICE, ConfigError, "are on ['cpu', 'cuda']; give one device"),
        (BOTH, None, [], ConfigError, "are on []; give one device"),
        (ONLY_NCCL, None, HOST, NotOfferedError, "the group has cuda:nccl"),
        (ONLY_NCCL, "torch_gloo", DEVICE, NotOfferedError, "no torch_gloo for experts: the group has"),
        (ONLY_GLOO, "torch_nccl", DEVICE, NotOfferedError, "no torch_nccl for experts: the group has"),
        (
            StatelessProcessGroup(0, 1, dist.HashStore(), None), "torch_nccl", HOST, ConfigError,
            "cannot serve a StatelessProcessGroup",
        ),
        ("ep", None, HOST, ConfigError, "no expert parallel group"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_refused(group, backend, weights, kind, text):
    with pytest.raises(kind) as caught:
        create_eplb_communicator(group, backend, weights)
    assert text in str(caught.value)
    assert issubclass(NotOfferedError, RuntimeError)
    assert issubclass(ConfigError, ValueError)


def test_a_timeout_is_the_environments_where_none_is_given(monkeypatch):
    monkeypatch.setenv("TCOMM_TIMEOUT", "33")
    assert (seconds_of(UNSET), seconds_of(4), seconds_of(None), seconds_of("streaming")) == (
        33,
        4,
        None,
        1800,
    )
