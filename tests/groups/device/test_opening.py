"""The communicator under a device communicator: of groups that torch knows, and of others."""

import datetime

import pytest
import torch
import torch.distributed as dist

from tcomm.errors import CapabilityError, ConfigError
from tcomm.groups.arguments import UNSET
from tcomm.groups.device import CpuCommunicator
from tcomm.groups.device.opening import open_communicator


def _raised(kind, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except kind as error:
        return str(error)
    return "nothing was raised"


def _unknown_group(member, use_kernels, told):
    """A process group that torch has no list of, as a stateless one."""
    store = dist.PrefixStore("stateless", member.store)
    group = dist.ProcessGroup(store, member.rank, member.world_size)
    limit = datetime.timedelta(seconds=20)
    backend = dist.ProcessGroupGloo(store, member.rank, member.world_size, limit)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    if told:
        ranks = {"global_ranks": [5, 3]} if not use_kernels else {}
        return _raised(
            (ConfigError, CapabilityError), lambda: CpuCommunicator(group, use_kernels=use_kernels, **ranks)
        )
    device = CpuCommunicator(group, unique_name="dp:0", global_ranks=[5, 3], global_world_size=8)
    total = device.all_reduce(torch.tensor(member.rank + 1)).item()
    device.destroy()
    return total, device.ranks, device.global_rank, device.global_world_size


def test_a_group_that_torch_does_not_know(on_ranks):
    assert on_ranks(2, _unknown_group, True, False) == [(3, [5, 3], 5, 8), (3, [5, 3], 3, 8)]


def test_a_group_with_nothing_to_use_is_refused(on_ranks):
    assert "does not know this group" in on_ranks(2, _unknown_group, False, True)[0]
    assert "give global_ranks=" in on_ranks(2, _unknown_group, True, True)[0]


def _known_group(member):
    member.process_group()
    with open_communicator(dist.group.WORLD, "tp:0", None, False, 20.0) as communicator:
        return communicator.explain("all_reduce", algorithm="torch").reason, communicator.name


def test_a_group_that_torch_knows(on_ranks):
    assert on_ranks(2, _known_group) == [("'torch' was asked for by name", "tp:0")] * 2


def test_one_process_alone():
    with open_communicator(None, "tp:0", [4], True, 7.0) as alone:
        assert (alone.name, alone.world_size, alone.timeout) == ("tp:0", 1, 7.0)
    with pytest.raises(ConfigError, match=r"global_ranks=\[0, 1\] has 2 entries for 1 ranks"):
        open_communicator(None, "", [0, 1], True, UNSET)
