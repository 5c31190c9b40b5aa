import types

import numpy as np
import pytest
import torch

from tcomm.eplb.moving.rank_mapping import rank_change
from tcomm.eplb.policies import EPLB_POLICIES, AbstractEplbPolicy
from tcomm.eplb.state.model_state import EplbModelState
from tcomm.eplb.state.rearrangement import LayerSwitch, carry_out, plan_move
from tcomm.eplb.state.statistics import EplbStats
from tcomm.errors import ConfigError, PeerLostError
from tests.eplb.state.toy import GatheringMover, Toy, lone_group

FIRST = np.array([[0, 1, 2, 3, 0, 1]] * 2)
LOAD = torch.tensor([[2, 1, 9, 2], [0, 0, 0, 0]])


def _stats(load=LOAD, slots=6, gpus=2):
    return EplbStats(load, slots, 1, 1, gpus)


def test_experts_that_stay_keep_their_slots_and_a_layer_without_load_its_map():
    move = plan_move(FIRST, _stats(), "default", rank_change(None, 2, 2))
    assert move.plan.phy2log.tolist() == [[2, 1, 2, 3, 0, 2], [0, 1, 2, 3, 0, 1]]
    assert move.layers == [0]
    assert move.after is move.plan.phy2log or move.after.tolist() == move.plan.phy2log.tolist()
    assert move.migration.num_copies == 1
    report = move.report(LOAD.numpy(), 0.5)
    assert (report.before, report.after, report.bound) == (pytest.approx(2 / 3), 1.0, 1.0)
    assert (report.num_layers, report.num_copies, report.moving_seconds) == (1, 1, 0.5)
    text = str(report)
    assert "balancedness 0.667 -> 1.000 (at most 1.000), 1 copies between ranks in 1 layers" in text
    assert "by default (one node: any expert may be on any GPU), moved in 500.0 ms" in text


def test_no_load_at_all_is_as_even_as_can_be():
    move = plan_move(FIRST, _stats(torch.zeros_like(LOAD)), "search", rank_change(None, 2, 2))
    assert move.layers == []
    report = move.report(np.zeros((2, 4)), 0.0)
    assert (report.before, report.after, report.bound, report.policy) == (1.0, 1.0, 1.0, "search")


def test_the_policy_is_found_by_name_and_knows_the_map_in_force(monkeypatch):
    seen = []

    class Policy(AbstractEplbPolicy):
        @classmethod
        def rebalance_experts(cls, *arguments):
            seen.append(arguments[-1].tolist())
            return torch.from_numpy(FIRST[:, ::-1].copy()), None, None

    monkeypatch.setitem(EPLB_POLICIES, "turn", Policy)
    move = plan_move(FIRST, _stats(LOAD + 1), "turn", rank_change(None, 2, 2))
    assert seen == [FIRST.tolist()]
    assert move.plan.phy2log.tolist() == FIRST[:, ::-1].tolist()


def test_a_negative_load_is_refused_with_the_rule():
    with pytest.raises(ConfigError, match="load of expert 1 in layer 0 is -3; give numbers from 0"):
        plan_move(FIRST, _stats(torch.tensor([[1, -3, 1, 1]] * 2)), "default", rank_change(None, 2, 2))


def test_who_leaves_gives_and_gets_nothing():
    move = plan_move(FIRST, _stats(slots=6, gpus=1), "default", rank_change({0: 0}, 1, 1))
    assert move.change.is_none
    old = np.array([[0, 1, 2, 3, 0, 1, 2, 3]] * 2)
    move = plan_move(old, _stats(slots=4, gpus=1), "default", rank_change({0: -1, 1: 0}, 2, 2))
    assert move.before is old
    assert sorted(move.plan.phy2log[0]) == [0, 1, 2, 3]
    assert move.after[:, :4].tolist() == [[-1] * 4] * 2
    assert move.after[:, 4:].tolist() == move.plan.phy2log.tolist()
    assert move.migration.num_copies == 0


def test_who_joins_gets_experts_and_those_that_stay_keep_their_slots():
    move = plan_move(FIRST, _stats(slots=9, gpus=3), "default", rank_change({0: 0, 1: 2}, 2, 3))
    assert move.before[0].tolist() == [0, 1, 2, -1, -1, -1, 3, 0, 1]
    # Of layer 0 experts 0, 2 and 1 stay on their ranks, and keep slots 0, 2 and 8.
    assert move.after.tolist() == [[0, 3, 2, 2, 2, 0, 2, 2, 1], [0, 1, 2, 3, 0, 1, 3, 0, 2]]
    assert move.report(LOAD.numpy(), 0.0).before is None
    assert "balancedness unknown -> " in str(move.report(LOAD.numpy(), 0.0))
    assert move.plan.reason.endswith("; other ranks")


def test_an_expert_that_nobody_has_any_more_is_named():
    lost = np.array([[0, 1, 0, 1, 2, 3]] * 2)
    with pytest.raises(ConfigError, match="no rank has expert 2 of layer 0 any more; load its weights"):
        plan_move(lost, _stats(slots=4, gpus=2), "default", rank_change({0: 0, 1: 1, 2: -1}, 3, 2))


def _state(group):
    model = Toy(group, experts=4, redundant=2)
    state = EplbModelState.of_model(
        model, FIRST, name="toy", window_size=2, most_slots=6, counts_own_slots=False,
        device=torch.device("cpu"),
    )  # fmt: skip
    model.set_eplb_state(state.counted, state.logical_to_physical_map, state.logical_replica_count)
    return model.fill(state.physical_to_logical_map), state


def _move(load):
    return plan_move(FIRST, _stats(torch.tensor(load), gpus=1), "default", rank_change(None, 1, 1))


def test_each_layer_is_prepared_committed_and_switched_before_the_next():
    with lone_group() as group:
        model, state = _state(group)
        mover = GatheringMover(group)
        move = _move([[1, 1, 9, 1], [9, 9, 1, 20]])
        assert carry_out(state, move, lambda given: mover if given is state else None) > 0
        assert mover.calls == [("prepare", 0), ("commit", 0), ("prepare", 1), ("commit", 1)]
        assert model.holds() == state.physical_to_logical_map.tolist() == move.after.tolist()


def test_what_moves_weights_settles_when():
    asked = []
    mover = types.SimpleNamespace(settle=lambda word: asked.append(word) or True)
    switch = LayerSwitch(None, 0, None, None, mover)
    assert switch.settle(False) is True
    assert asked == [False]
    alone = LayerSwitch(None, 0, None, None, None)
    assert [alone.settle(word) for word in (True, False)] == [True, False]


def test_nothing_that_moves_weights_is_made_when_none_have_to_move():
    with lone_group() as group:
        _, state = _state(group)
        carry_out(state, _move([[0, 0, 0, 0]] * 2), None)
        assert state.phy2log().tolist() == FIRST.tolist()


def test_an_error_leaves_whole_layers_and_says_which_are_new():
    with lone_group() as group:
        model, state = _state(group)
        state.mover = mover = GatheringMover(group, fails_at=1)
        move = _move([[1, 1, 9, 1], [9, 9, 1, 20]])
        with pytest.raises(PeerLostError) as caught:
            carry_out(state, move, lambda given: mover)
        [note] = caught.value.__notes__
        assert note.startswith(
            "while the experts of layer 1 of toy were moved; layers 0 have their new places"
        )
        assert state.phy2log().tolist() == [move.after[0].tolist(), FIRST[1].tolist()] == model.holds()
        assert state.mover is None
        assert mover.calls[-1] == ("close", -1)
