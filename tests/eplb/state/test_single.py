import pytest
import torch

from tcomm.eplb.state.single import model_may_be_left_out
from tcomm.eplb.state.state import EplbState
from tcomm.errors import UsageError
from tests.eplb.state.toy import ModelConfig, Toy, config, lone_group

NAMES = [
    "physical_to_logical_map", "logical_to_physical_map", "logical_replica_count", "expert_load_pass",
    "expert_load_window",
]  # fmt: skip


def test_maps_of_the_only_model_are_attributes():
    with lone_group() as group:
        state = EplbState(config(), torch.device("cpu"), ep_group=group)
        with pytest.raises(UsageError, match="the state has 0 models; ask model_states"):
            _ = state.expert_load_pass
        state.add_model(Toy(group), ModelConfig("a"))
        [only] = state.model_states.values()
        for name in NAMES:
            assert getattr(state, name) is getattr(only, name)
        state.add_model(Toy(group), ModelConfig("b"))
        with pytest.raises(UsageError, match="the state has 2 models"):
            _ = state.logical_replica_count


class _Called:
    @model_may_be_left_out
    def call(self, model=None, flag=False, other=None, *, last=0):
        """Say what it was given."""
        return model, flag, other, last


def test_a_model_may_be_left_out_in_front():
    called = _Called()
    assert called.call() == (None, False, None, 0)
    assert called.call(True, 1, last=2) == (None, True, 1, 2)
    assert called.call("model", True) == ("model", True, None, 0)
    assert called.call(flag=True) == (None, True, None, 0)
    assert _Called.call.__doc__ == "Say what it was given."
