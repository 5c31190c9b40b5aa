"""Groups as objects and as names."""

import gc

import pytest
import torch

import tcomm
from tcomm.errors import ConfigError, UsageError
from tcomm.groups.compiled.engines import find_engine, find_torch_engine, name_of
from tcomm.groups.device import DeviceCommunicatorBase
from tests.groups.compiled.groups import Alone, Group


def test_an_object_has_one_name_while_it_lives():
    with tcomm.Communicator() as communicator:
        name = name_of(communicator)
        assert name_of(communicator) == name
        assert find_engine(name) == (communicator, "")
    del communicator
    gc.collect()
    with pytest.raises(ConfigError, match=f"Group {name} is destroyed"):
        find_engine(name)


def test_names_are_names_of_registered_groups():
    group = Group()
    assert name_of(group.unique_name) == group.unique_name
    assert find_engine(group.unique_name) == (group.device_communicator.communicator, "")
    assert find_engine(name_of(group)) == find_engine(group.unique_name)
    name = name_of(group)
    group.destroy()
    for gone in (group.unique_name, name):
        with pytest.raises(ConfigError, match=f"Group {group.unique_name} is destroyed"):
            find_engine(gone)
    with pytest.raises(UsageError, match="Group tp:99 is not found"):
        find_engine("tp:99")


def test_a_device_communicator_brings_its_algorithm():
    device = DeviceCommunicatorBase(None, use_kernels=False)
    assert find_engine(name_of(device)) == (device.communicator, "torch")
    device.destroy()


def test_a_group_of_one_without_a_communicator():
    group, other = Alone(), Alone()
    engine = find_engine(group.unique_name)
    assert engine.communicator.all_reduce(torch.ones(2)).tolist() == [1, 1]
    assert find_engine(other.unique_name) == engine


def test_what_is_no_group():
    for wrong in (3, None, object):
        with pytest.raises(ConfigError, match="is no group: give a Communicator"):
            name_of(wrong)


def test_groups_by_the_name_that_torch_has_for_them():
    class TorchGroup:
        group_name = "42"

    group = Group()
    group.device_group = TorchGroup()
    assert find_torch_engine("42") == (group.device_communicator.communicator, "")
    assert find_torch_engine("43") is None
    group.destroy()
    assert find_torch_engine("42") is None
