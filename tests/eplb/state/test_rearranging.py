import logging

import pytest
import torch

from tcomm.eplb import AbstractEplbPolicy, register_policy
from tcomm.eplb.moving.messages import MessageMover
from tcomm.eplb.moving.symmetric import SymmetricMover
from tcomm.eplb.state import meeting, rearranging
from tcomm.eplb.state.rearranging import count_nodes
from tcomm.eplb.state.state import EplbState
from tcomm.errors import CollectiveMismatchError, ConfigError, NotOfferedError, UsageError
from tcomm.groups.parallel.coordinator import GroupCoordinator
from tests.eplb.state.toy import ModelConfig, Toy, ToyState, config, expert_group, lone_group


@pytest.mark.parametrize(
    ("hosts", "nodes"),
    [
        ([7], 1),
        ([7, 7, 7], 1),
        ([7, 7, 3, 3], 2),
        ([1, 2, 3], 3),
        ([7, 7, 3], 0),
        ([7, 3, 7, 3], 0),
        ([7, 3, 3, 7], 0),
        ([7, 3, 3, 3], 0),
    ],
)
def test_nodes_that_share_ranks_evenly_and_in_order_are_counted(hosts, nodes):
    assert count_nodes(hosts) == nodes


def test_the_group_is_that_given_or_that_of_now(monkeypatch):
    with lone_group() as group:
        assert EplbState(config(), "cpu", ep_group=group).ep_group is group
        state = EplbState(config(), "cpu")
        with pytest.raises(UsageError, match="expert parallel group is not initialized"):
            _ = state.ep_group
        monkeypatch.setattr(rearranging, "get_ep_group", lambda: group)
        assert state.ep_group is group
        other = GroupCoordinator([[0]], 0, "gloo", True, group_name="other")
        state.ep_group = other
        assert state.ep_group is other
        for take in (lambda: setattr(state, "ep_group", 3), lambda: EplbState(config(), "cpu", ep_group=3)):
            with pytest.raises(ConfigError, match="3 is no GroupCoordinator"):
                take()
        other.destroy()


def test_what_moves_weights_suits_the_group_and_the_config():
    with lone_group() as group:
        weights = [torch.zeros(3, 2)]
        for communicator, kind in ((None, SymmetricMover), ("torch_gloo", MessageMover)):
            state = EplbState(config(communicator=communicator), "cpu", ep_group=group)
            mover = state.make_mover(group, weights)
            assert type(mover) is kind
            mover.close()
        with pytest.raises(NotOfferedError, match="nixl is not offered here"):
            EplbState(config(communicator="nixl"), "cpu", ep_group=group).make_mover(group, weights)


def _lines(call):
    """What the log says meanwhile."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("tcomm")
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        call()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    return [line for line in lines if "expert" in line]


def _counts_the_example(member, shape):
    """The example of docs/eplb/state.md: what the log says, and where experts are."""
    with expert_group(member) as group:
        model = Toy(group, layers=1)
        state = EplbState(config(step_interval=8, log_balancedness=True), torch.device("cpu"), ep_group=group)
        if shape == "one model":
            state = EplbState.build(model, torch.device("cpu"), config(step_interval=8), ep_group=group)
        else:
            state.add_model(model, ModelConfig())
        model.fill(state.physical_to_logical_map)
        tokens = torch.tensor([1, 1, 9, 2, 1, 0], dtype=torch.int32)
        if shape == "one model":
            state.expert_load_pass.copy_(tokens.view(2, 3)[member.rank])
        else:
            state.expert_load_pass.copy_(tokens // 2 + tokens % 2 * member.rank)
        lines = _lines(lambda: state.step(log_stats=True))
        lines += _lines(state.step)
        [only] = state.model_states.values()
        statistics = only.last_statistics
        report = only.last_rearrangement
        told = statistics.avg_tokens, statistics.max_tokens, report.before, report.after, report.num_copies
        return lines, told, state.physical_to_logical_map.tolist(), model.holds(), only.eplb_stats.num_gpus


@pytest.mark.parametrize("shape", ["one model", "models"])
def test_the_example_of_the_documentation(on_ranks, shape):
    results = on_ranks(2, _counts_the_example, shape)
    name = "" if shape == "one model" else "toy "
    for rank, (lines, told, phy2log, holds, num_gpus) in enumerate(results):
        assert told == (7, 11, pytest.approx(2 / 3), 1.0, 1)
        assert phy2log == [[2, 1, 2, 3, 0, 2]]
        assert holds == [[[2, 1, 2], [3, 0, 2]][rank]]
        assert num_gpus == 2
        if rank:
            assert not any("balancedness" in line for line in lines)
    assert results[0][0][0].startswith(
        f"expert load of {name}step 1: avg_tokens=7.00, max_tokens=11, balancedness=0.6364"
    )
    assert results[0][0][-1].startswith(
        f"experts of {name}rearranged at step 2: balancedness 0.667 -> 1.000 (at most 1.000), 1 copies "
        "between ranks in 1 layers; planned in "
    )


def _on_nodes(member, node_of):
    """Whether each group of experts is on one node, after a rearrangement; and what the log says."""
    meeting.host_identity = lambda: f"node {node_of[member.rank]}"
    with expert_group(member) as group:
        model = Toy(group, layers=1, experts=8, redundant=4, groups=2)
        state = EplbState.build(model, torch.device("cpu"), config(), ep_group=group)
        model.fill(state.physical_to_logical_map)
        size = model.num_local_physical_experts
        load = torch.tensor([[1, 2, 3, 4, 90, 6, 7, 8]])
        lines = _lines(lambda: state.rearrange(global_expert_load=load))
        nodes = {}
        for slot, expert in enumerate(state.physical_to_logical_map[0].tolist()):
            nodes.setdefault(expert // 4, set()).add(node_of[slot // size])
        [only] = state.model_states.values()
        stats = only.eplb_stats
        return (
            all(len(found) == 1 for found in nodes.values()),
            (stats.num_nodes, stats.num_groups),
            [line for line in lines if "nodes" in line],
        )


def test_groups_stay_on_nodes_that_share_ranks_evenly(on_ranks):
    for stay, numbers, _ in on_ranks(4, _on_nodes, [0, 0, 1, 1]):
        assert stay
        assert numbers == (2, 2)


def test_any_expert_may_be_anywhere_where_nodes_do_not_share_ranks_evenly(on_ranks):
    for stay, numbers, lines in on_ranks(4, _on_nodes, [0, 1, 1, 1]):
        assert not stay
        assert numbers == (1, 1)
        assert lines[0].startswith("4 ranks are on 2 nodes, which do not share them evenly and in order")


class _Turned(AbstractEplbPolicy):
    @classmethod
    def rebalance_experts(cls, weight, *_):
        return torch.tensor([[1, 0, 2, 3, 0, 1]]), None, None


def _disagrees(member):
    """What ranks that go by different loads, maps or numbers of steps are told."""
    with expert_group(member) as group:
        model = Toy(group, layers=1)
        state = ToyState.build(model, torch.device("cpu"), config(step_interval=20), ep_group=group)
        model.fill(state.physical_to_logical_map)
        first = state.physical_to_logical_map.tolist()
        rank = member.rank
        told = []

        def refused(call):
            with pytest.raises(CollectiveMismatchError) as caught:
                call()
            told.append((caught.value.peers, str(caught.value)))

        refused(lambda: state.rearrange(global_expert_load=torch.tensor([[1, 1, 9 + rank, 1]])))
        if rank:
            state.step()
        refused(state.rearrange)
        refused(lambda: state.step(log_stats=True))
        refused(lambda: state.step(is_profile=True))
        if not rank:
            state.step()
        # A plan that is not the same everywhere is noticed before anything moves.
        register_policy("turned", _Turned)
        state.policy_name = "default" if rank else "turned"
        refused(lambda: state.rearrange(global_expert_load=torch.tensor([[1, 1, 9, 1]])))
        assert state.physical_to_logical_map.tolist() == first
        state.policy_name = "default"
        state.rearrange(global_expert_load=torch.tensor([[2, 1, 9, 2]]))
        return told, state.physical_to_logical_map.tolist()


def test_ranks_that_go_by_other_things_are_named_and_nothing_changes(on_ranks):
    results = on_ranks(2, _disagrees)
    for rank, (told, phy2log) in enumerate(results):
        assert [peers for peers, _ in told] == [(1 - rank,)] * 5
        loads, steps, statistics, profile, plans = (text for _, text in told)
        assert "rank 0: step 0, plan" in loads
        assert "rank 0: step 0, loads, 1 models, facts 00000000\n  rank 1: step 1, loads" in steps
        assert "rank 1: step 1, statistics" in statistics
        assert "rank 1: step 1, profile" in profile
        assert "rank 0: step 1, move" in plans
        assert phy2log == [[2, 1, 2, 3, 0, 2]]


def test_a_group_of_another_size_is_noticed():
    with lone_group() as group:
        state = EplbState(config(step_interval=100), "cpu", ep_group=group)
        state.add_model(Toy(group), ModelConfig(), max_physical_experts=12)
        state.update_mapping(torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 0, 1]] * 2))
        for call in (lambda: state.step(log_stats=True), state.rearrange):
            with pytest.raises(ConfigError, match="on 2 ranks and the group has 1; give rank_mapping"):
                call()
