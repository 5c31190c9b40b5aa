import dataclasses

import pytest

from tcomm.errors import ConfigError
from tcomm.groups.parallel.eplb_config import EPLBConfig, as_eplb_config


def test_the_defaults():
    assert dataclasses.asdict(EPLBConfig()) == {
        "window_size": 1000,
        "step_interval": 3000,
        "num_redundant_experts": 0,
        "log_balancedness": False,
        "log_balancedness_interval": 1,
        "use_async": False,
        "policy": "default",
        "communicator": None,
        "enable_migration_batching": False,
    }


@pytest.mark.parametrize("communicator", [None, "torch_gloo", "torch_xccl", "nixl"])
def test_what_fits_is_kept(communicator):
    config = EPLBConfig(use_async=True, communicator=communicator, window_size=1, num_redundant_experts=32)
    assert (config.use_async, config.communicator, config.num_redundant_experts) == (True, communicator, 32)


@pytest.mark.parametrize("asked", [True, False])
def test_migration_is_batched_where_asked_for(asked):
    assert EPLBConfig(enable_migration_batching=asked).migration_batching_enabled is asked


KERNELS = "whose kernels wait for those of the forward pass; give another communicator, or None"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"window_size": 0}, "window_size must be greater than 0. Given: 0"),
        ({"step_interval": -1}, "step_interval must be greater than 0. Given: -1"),
        ({"step_interval": 2.5}, "step_interval must be greater than 0. Given: 2.5"),
        ({"log_balancedness_interval": 0}, "log_balancedness_interval must be greater than 0. Given: 0"),
        ({"num_redundant_experts": -1}, "num_redundant_experts=-1 is wrong; give an integer of 0 or more"),
        *[
            ({name: wrong}, f"{name}={wrong!r} is wrong; give True or False")
            for name in ("log_balancedness", "use_async", "enable_migration_batching")
            for wrong in (None, 1, "x")
        ],
        ({"policy": None}, "policy=None is wrong; give a string"),
        (
            {"communicator": ["nixl"]},
            "communicator=['nixl'] is none of torch_nccl, torch_gloo, torch_xccl, nixl, pynccl",
        ),
        (
            {"communicator": "mpi"},
            "communicator='mpi' is none of torch_nccl, torch_gloo, torch_xccl, nixl, pynccl",
        ),
        (
            {"use_async": True, "policy": "mine"},
            "Async EPLB is only supported with the default policy. Given: policy='mine'",
        ),
        (
            {"use_async": True, "communicator": "torch_nccl"},
            f"Async EPLB cannot move weights by torch_nccl, {KERNELS}",
        ),
        (
            {"use_async": True, "communicator": "pynccl"},
            f"Async EPLB cannot move weights by pynccl, {KERNELS}",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(fields, told):
    with pytest.raises(ValueError, match=r".") as caught:
        EPLBConfig(**fields)
    assert isinstance(caught.value, ConfigError)
    assert str(caught.value) == told


def test_a_dict_of_fields_will_do():
    config = EPLBConfig()
    assert as_eplb_config(config) is config
    assert as_eplb_config(None) == config
    assert as_eplb_config({"window_size": 3}) == EPLBConfig(window_size=3)
    for wrong in (1.5, "x", [1], True):
        with pytest.raises(ConfigError, match="give an EPLBConfig, or a dict of its fields"):
            as_eplb_config(wrong)
    for wrong in ("windows", 1):
        with pytest.raises(ConfigError, match=f"eplb_config has no {wrong!r}; its fields are window_size, "):
            as_eplb_config({wrong: 3})
    with pytest.raises(ConfigError, match="window_size must be greater than 0"):
        as_eplb_config({"window_size": 0})
