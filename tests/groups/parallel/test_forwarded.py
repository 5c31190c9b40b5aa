import dataclasses

import pytest

from tcomm.errors import ConfigError
from tcomm.groups.parallel.eplb_config import EPLBConfig
from tcomm.groups.parallel.forwarded import Forwarded
from tcomm.groups.parallel.parallel_config import ParallelConfig

WIDE = {"tensor_parallel_size": 2, "enable_expert_parallel": True, "enable_eplb": True}
OLDER = {
    "num_redundant_experts": "num_redundant_experts",
    "eplb_window_size": "window_size",
    "eplb_step_interval": "step_interval",
    "eplb_log_balancedness": "log_balancedness",
}


@pytest.mark.parametrize(("older", "name"), OLDER.items())
def test_an_older_name_reads_and_writes_the_newer_one(older, name):
    value = True if name == "log_balancedness" else 7
    by_old = ParallelConfig(**WIDE, **{older: value})
    by_new = ParallelConfig(**WIDE, eplb_config=EPLBConfig(**{name: value}))
    both = ParallelConfig(**WIDE, eplb_config=EPLBConfig(**{name: value}), **{older: value})
    assert by_old == by_new == both
    assert getattr(by_new, older) == getattr(by_old.eplb_config, name) == value
    default = ParallelConfig.__dataclass_fields__[older].default
    setattr(by_old, older, default)
    assert getattr(by_old.eplb_config, name) == default
    by_new.eplb_config = EPLBConfig()
    assert getattr(by_new, older) == default
    assert getattr(EPLBConfig(), name) == default == getattr(ParallelConfig, older)


def test_what_was_given_stays_as_it_is():
    given = EPLBConfig()
    config = ParallelConfig(**WIDE, eplb_config=given, num_redundant_experts=3)
    assert config.num_redundant_experts == 3
    config.eplb_window_size = 9
    unchanged = ParallelConfig(**WIDE, eplb_config=given)
    unchanged.eplb_window_size = 9
    assert given == EPLBConfig()
    assert dataclasses.replace(config, tensor_parallel_size=4).eplb_config == EPLBConfig(
        num_redundant_experts=3, window_size=9
    )


def test_a_contradiction_is_refused():
    with pytest.raises(ConfigError) as caught:
        ParallelConfig(**WIDE, eplb_config=EPLBConfig(window_size=5), eplb_window_size=6)
    assert str(caught.value) == (
        "eplb_window_size=6 contradicts eplb_config.window_size=5, of which it is an older name; "
        "give one of them"
    )


@pytest.mark.parametrize("when", ["made", "set"])
def test_a_wrong_value_is_refused_by_either_name(when):
    made = ParallelConfig(**WIDE)
    refuse = {
        "made": lambda: ParallelConfig(**WIDE, num_redundant_experts=-2),
        "set": lambda: setattr(made, "num_redundant_experts", -2),
    }
    with pytest.raises(ConfigError) as caught:
        refuse[when]()
    assert made.eplb_config == EPLBConfig()
    assert str(caught.value) == "num_redundant_experts=-2 is wrong; give an integer of 0 or more"


def test_a_field_of_a_class_is_its_default():
    class Holder:
        older = Forwarded("window_size", 1000)

    assert Holder.older == 1000
    holder = Holder()
    holder.eplb_config = EPLBConfig(window_size=4)
    assert holder.older == 4
    holder.world_size = 1
    holder.older = 5
    assert holder.eplb_config.window_size == 5
