import dataclasses
import re

import pytest
import torch

from tcomm.eplb.state.state import EplbState
from tcomm.eplb.state.stepping import checked_load
from tcomm.errors import ConfigError, UsageError
from tests.eplb.state.toy import ModelConfig, Toy, ToyState, config, lone_group


@pytest.fixture
def group():
    with lone_group() as alone:
        yield alone


@pytest.fixture
def made(group):
    """A state for one model, and the model."""

    def make(cls=ToyState, **given):
        model = Toy(group)
        state = cls.build(model, torch.device("cpu"), config(**given), ep_group=group)
        return state, model.fill(state.physical_to_logical_map)

    return make


def _rearranges(state, monkeypatch):
    """At which steps, from now on."""
    seen = []
    monkeypatch.setattr(state, "rearrange", lambda *_: seen.append(state.num_steps))
    return seen


def test_experts_are_rearranged_after_a_quarter_interval_and_then_after_each(made, monkeypatch):
    state, model = made(step_interval=8)
    assert state.expert_rearrangement_step == 6
    seen = _rearranges(state, monkeypatch)
    for number in range(20):
        state.step(model, is_dummy=number % 3 == 0)
    assert seen == [2, 10, 18]
    assert state.expert_rearrangement_step == 2


def test_passes_go_round_the_window_and_dummies_do_not(made):
    state, _ = made(step_interval=100, window_size=2)
    for number in (1, 2, 3):
        state.expert_load_pass[0, 0] = number
        state.step()
        assert not state.expert_load_pass.any()
        assert state.expert_load_window_step == number % 2
    state.expert_load_pass[0, 0] = 99
    state.step(is_dummy=True)
    assert not state.expert_load_pass.any()
    assert state.expert_load_window[:, 0, 0].tolist() == [3, 2]
    assert state.expert_load_window_step == 1
    assert state.num_steps == 4


def test_the_model_in_front_may_be_left_out(made):
    state, model = made(step_interval=100)
    state.expert_load_pass[0, 0] = 5
    state.step(True)
    state.step(False, False, False)
    state.step(model, True)
    assert state.expert_load_window.sum() == 0
    assert state.expert_load_window_step == 1
    with pytest.raises(UsageError, match="this model is not one whose experts the state balances"):
        state.step(object())


def test_a_profile_reserves_memory_and_is_no_step(made):
    state, model = made(step_interval=100)
    state.expert_load_pass.fill_(1)
    for call in (
        lambda: state.step(is_profile=True), lambda: state.step(False, True),
        lambda: state.rearrange(model, True), lambda: state.rearrange(True),
    ):  # fmt: skip
        call()
    [only] = state.model_states.values()
    assert only.mover.calls == [("reserve", 2)] * 4
    assert (state.num_steps, state.expert_load_window_step) == (0, 0)
    assert state.expert_load_pass.all()


def test_statistics_are_told_at_intervals(made):
    state, _ = made(step_interval=100, log_balancedness_interval=3)
    [only] = state.model_states.values()
    told = []
    for _ in range(7):
        only.last_statistics = None
        state.expert_load_pass.fill_(2)
        state.step(log_stats=True)
        told.append(only.last_statistics and only.last_statistics.max_tokens)
    assert told == [24 if number % 3 == 0 else None for number in range(75, 82)]


def test_loads_are_recorded_while_they_matter(made, monkeypatch):
    state, _ = made(step_interval=8, window_size=3)
    _rearranges(state, monkeypatch)
    address, seen = state.should_record_tensor.data_ptr(), []
    for _ in range(11):
        seen.append(bool(state.should_record_tensor))
        state.step()
    # The first rearrangement is 2 steps away, the next ones 8.
    assert seen == [True] * 2 + [False] * 5 + [True] * 3 + [False]
    assert state.should_record_tensor.data_ptr() == address
    assert state.layer_state(0).should_record_tensor is state.should_record_tensor
    logging, _ = made(step_interval=8, window_size=3, log_balancedness=True)
    _rearranges(logging, monkeypatch)
    logging.step(), logging.step(), logging.step()
    assert logging.should_record_tensor


def test_a_window_that_has_nothing_changes_nothing(made):
    state, model = made()
    before = state.physical_to_logical_map.clone()
    assert state.rearrange() is None
    assert torch.equal(state.physical_to_logical_map, before)
    assert model.holds() == before.tolist()
    [only] = state.model_states.values()
    assert only.last_rearrangement.num_layers == 0
    assert only.mover is None


def test_a_rearrangement_goes_by_the_window_a_given_load_or_the_last_one(made):
    state, model = made()
    [only] = state.model_states.values()
    with pytest.raises(UsageError, match="no last load yet"):
        state.rearrange(use_last_expert_load=True)
    state.expert_load_window[1, 1, 3] = 7
    state.rearrange()
    assert only.last_expert_load.tolist() == [[0] * 4, [0, 0, 0, 7]]
    # What was counted in slots of layer 1, which has another map now, is forgotten.
    assert not state.expert_load_window.any()
    given = torch.tensor([[1, 1, 1, 9], [9, 1, 1, 1]])
    state.rearrange(model, False, True, given)
    assert only.last_expert_load.equal(given)
    assert state.logical_replica_count.tolist() == [[1, 1, 1, 3], [3, 1, 1, 1]]
    assert model.holds() == state.physical_to_logical_map.tolist()
    first = state.physical_to_logical_map.clone()
    state.rearrange(global_expert_loads=[given.flip(1)])
    assert not torch.equal(state.physical_to_logical_map, first)
    only.last_expert_load = given
    state.rearrange(use_last_expert_load=True)
    assert state.logical_replica_count.tolist() == [[1, 1, 1, 3], [3, 1, 1, 1]]


@pytest.mark.parametrize(
    ("load", "said"),
    [
        (torch.full((2, 4), torch.nan), "global_expert_load is torch.float32 [2, 4]; give int64 [2, 4]"),
        (torch.ones(2, 5, dtype=torch.int64), "is torch.int64 [2, 5]"),
        ([[1, 2, 3, 4]] * 2, "2 loads were given for 1 models"),
        ([None], "global_expert_load is NoneType"),
    ],
)
def test_a_load_that_is_none_is_refused(made, load, said):
    state, _ = made()
    for error in (AssertionError, ValueError):
        with pytest.raises(error, match=re.escape(said)):
            state.rearrange(global_expert_load=load)
    with pytest.raises(UsageError, match="not needed with execute_shuffle=False"):
        state.rearrange(execute_shuffle=False, global_expert_load=torch.ones(2, 4, dtype=torch.int64))


def test_a_negative_load_is_refused_and_the_map_stays(made):
    state, _ = made()
    before = state.physical_to_logical_map.clone()
    with pytest.raises(ConfigError, match="load of expert 1 in layer 0 is -1; give numbers from 0"):
        state.rearrange(global_expert_load=torch.tensor([[1, -1, 1, 1]] * 2))
    assert torch.equal(state.physical_to_logical_map, before)


def test_a_good_load_comes_to_the_host(made):
    state, _ = made()
    [only] = state.model_states.values()
    load = torch.ones(2, 4, dtype=torch.int64)
    assert checked_load(load, only).equal(load)


def test_loads_without_a_shuffle_are_returned_and_nothing_moves(made, group):
    state, _ = made()
    before = state.physical_to_logical_map.clone()
    state.expert_load_window[0, 0] = torch.tensor([1, 2, 3, 4, 5, 6])
    load = state.rearrange(execute_shuffle=False)
    assert load.tolist() == [[6, 8, 3, 4], [0] * 4]
    assert torch.equal(state.physical_to_logical_map, before)
    several = ToyState(config(), "cpu", ep_group=group)
    several.add_model(Toy(group), ModelConfig())
    assert [load.tolist() for load in several.rearrange(False, False)] == [[[0] * 4] * 2]
    assert several.rearrange(False) is None


@dataclasses.dataclass
class Worker:
    """What rearranges beside the forward pass, as far as a step knows."""

    is_busy: bool = True
    num_steps: int = 0

    def on_step(self):
        self.num_steps += 1
        return False


def test_a_rearrangement_waits_for_the_one_that_is_under_way(made, monkeypatch):
    state, _ = made(step_interval=4)
    state.async_worker = worker = Worker()
    seen = _rearranges(state, monkeypatch)
    for _ in range(3):
        state.step()
    assert (seen, state.expert_rearrangement_step) == ([], 6)
    worker.is_busy = False
    state.step()
    assert (seen, state.expert_rearrangement_step) == ([4], 0)
    assert worker.num_steps == 3


def test_real_tokens_of_each_micro_batch(made, group):
    state, _ = made()
    [tensor] = state.num_unpadded_tokens_tensors
    assert tensor.item() == 2**31 - 1
    state.prepare_forward(None, 5)
    assert tensor.item() == 5
    with pytest.raises(ConfigError, match="2 micro-batches were given; the config has 1"):
        state.prepare_forward(None, 5, [slice(0, 2), slice(2, 4)])
    given = dataclasses.replace(config(), enable_dbo=True)
    two = EplbState(given, "cpu", ep_group=group)
    slices = [slice(0, 4), type("Slice", (), {"token_slice": slice(4, 8)})]
    for tokens, parts in ((6, [4, 2]), (3, [3, 0]), (9, [4, 4])):
        two.prepare_forward(None, tokens, slices)
        assert [tensor.item() for tensor in two.num_unpadded_tokens_tensors] == parts


def test_a_layer_has_views_of_the_maps_of_its_model(group):
    state = EplbState(config(), "cpu", ep_group=group)
    models = [Toy(group), Toy(group, experts=5, redundant=3)]
    for name, model in zip("ab", models, strict=True):
        state.add_model(model, ModelConfig(name))
    layer = state.layer_state(1, ModelConfig("b"))
    assert layer.expert_load_view.data_ptr() == models[1].load[1].data_ptr()
    assert layer.logical_to_physical_map.data_ptr() == models[1].log2phy[1].data_ptr()
    assert layer.logical_replica_count.data_ptr() == models[1].logcnt[1].data_ptr()
    with pytest.raises(UsageError, match="no model was added with this model_config"):
        state.layer_state(0, ModelConfig("c"))
