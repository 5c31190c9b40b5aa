"""The communicator of GPUs, as far as it needs none."""

import pytest
import torch
import torch.distributed as dist

from tcomm.errors import CapabilityError, ConfigError
from tcomm.groups.device import CudaCommunicator


def test_it_is_for_gpus():
    for device in (None, "cpu"):
        with pytest.raises(ConfigError, match="CudaCommunicator is for cuda, not for cpu"):
            CudaCommunicator(None, device)
    device = CudaCommunicator(None, "cuda:1", unique_name="ep:0", use_all2all=True)
    assert (device.device, device.world_size, device.use_all2all) == (torch.device("cuda:1"), 1, True)
    device.destroy()
    assert not torch.cuda.is_initialized()


def _by_group(member):
    """The group of the device carries calls; without one of NCCL there is nothing to fall back to."""
    member.process_group()
    other = dist.new_group(backend="gloo")
    device = CudaCommunicator(dist.group.WORLD, f"cuda:{member.rank}", other, "tp:0", use_kernels=False)
    same = device.communicator._members.process_group is other
    try:
        told = str(device.explain("all_reduce"))
    except CapabilityError as error:
        told = str(error)
    device.destroy()
    return same, told


def test_it_runs_on_the_group_of_its_device(on_ranks):
    for same, told in on_ranks(2, _by_group):
        assert same
        assert "torch:gloo" in told
