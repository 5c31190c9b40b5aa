import contextlib
import os
import signal
import time

import pytest
import torch

from tcomm.eplb.policies import DefaultEplbPolicy
from tcomm.eplb.state.state import EpConfigurationError, EplbState
from tcomm.errors import ConfigError, PeerLostError, PeerTimeoutError, UsageError
from tcomm.groups.parallel.coordinator import GroupCoordinator
from tests.eplb.state.toy import (
    ModelConfig,
    Toy,
    ToyState,
    config,
    expert_group,
    lone_group,
    skewed_choices,
)
from tests.groups.parallel.engine import engine

CPU = torch.device("cpu")


def _tokens(rank, layers=3, experts=6):
    """Six tokens, and which experts each of them chooses in each layer."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(6, 4, generator=generator), skewed_choices(6, layers, experts, rank)


def _agrees(model, state):
    """Whether this rank's weights are where the map in force says."""
    first = model.rank * model.num_local_physical_experts
    mine = state.physical_to_logical_map[:, first : first + model.num_local_physical_experts]
    return model.holds() == mine.tolist()


def _runs_on(member, shape):
    """Outputs before and after a rearrangement that steps bring about, and what happened."""
    with contextlib.ExitStack() as stack:
        if shape == "one model":
            group = stack.enter_context(expert_group(member))
            model = Toy(group, layers=3, experts=6)
            state = EplbState.build(model, CPU, config(), ep_group=group)
        else:
            parallel = stack.enter_context(engine(member, tp=member.world_size))
            model = Toy(parallel.get_ep_group(), layers=3, experts=6)
            state = EplbState(config(), CPU)
            state.add_model(model, ModelConfig())
        model.fill(state.physical_to_logical_map)
        addresses = [x.data_ptr() for x in (state.logical_to_physical_map, state.logical_replica_count)]
        given = _tokens(member.rank)
        before, old = model(*given), state.physical_to_logical_map.clone()
        # As an engine steps; and then once more as a test does.
        with torch.inference_mode():
            state.step(is_profile=True)
            state.step(log_stats=True)
        after, new = model(*given), state.physical_to_logical_map
        assert addresses == [x.data_ptr() for x in (model.log2phy, model.logcnt)]
        assert _agrees(model, state)
        same_map, report = torch.equal(old, new), state._only.last_rearrangement
        state.rearrange(global_expert_load=state._only.last_expert_load.flip(1))
        assert _agrees(model, state)
        state.close()
        assert state._only.mover is None
        return torch.equal(before, after), same_map, new.tolist(), report


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("shape", ["one model", "models"])
def test_tokens_come_out_the_same_wherever_experts_are(on_ranks, world_size, shape):
    results = on_ranks(world_size, _runs_on, shape)
    for same_bits, same_map, new, report in results:
        assert same_bits
        assert not same_map
        assert new == results[0][2]
        assert report.before < report.after <= report.bound + 1e-9


ROWS = {"old": [[0, 2], [1]], "all": [[0, 1, 2]], "left": [[0], [1, 2]]}
MAPPING = {0: 0, 1: 2}


class _Rank:
    """A rank whose group changes: 0 and 2 balance a model; 1 joins, so that 2 is the third; then 0 leaves."""

    def __init__(self, member, is_single):
        member.process_group()
        self.rank, self.is_single = member.rank, is_single
        self.groups = {
            name: GroupCoordinator(row, member.rank, "gloo", True, group_name=name, timeout=20)
            for name, row in ROWS.items()
        }
        self.config = config(step_interval=100, enable_elastic_ep=True, elastic_ep_max_dp_size=2)
        self.given, self.outputs = _tokens(member.rank, experts=4), []

    def begin(self, name, redundant, *joining):
        self.model, group = Toy(self.groups[name], layers=3, redundant=redundant), self.groups[name]
        if self.is_single:
            self.state = EplbState.build(self.model, CPU, self.config, *joining, ep_group=group)
        else:
            self.state = EplbState(self.config, CPU, ep_group=group)
            self.state.add_model(self.model, ModelConfig(), *joining)

    def move_to(self, name):
        self.state.ep_group = self.model.group = self.groups[name]
        self.model.rank = self.groups[name].rank_in_group

    def forward(self):
        assert _agrees(self.model, self.state)
        self.outputs.append(self.model(*self.given))
        return self.state.expert_load_pass.sum().item()

    def join(self):
        """As rank 1; the load that it was told."""
        if self.is_single:
            load, old = EplbState.recv_state(ep_group=self.groups["all"])
        else:
            [load], [old], mapping = EplbState.get_eep_state(self.config, ep_group=self.groups["all"])
            assert mapping == {0: 0, 1: 1}
            assert self.config.num_redundant_experts == 5
        self.begin("all", 5, load, old, MAPPING)
        return load

    def grow(self):
        """As ranks 0 and 2; the load that they told."""
        self.begin("old", 2)
        model, state = self.model.fill(self.state.physical_to_logical_map), self.state
        addresses = [x.data_ptr() for x in (model.load, model.log2phy, model.logcnt)]
        self.forward()
        state.step()
        self.move_to("all")
        load = state.rearrange(execute_shuffle=False)
        state.rearrange(global_expert_load=load, rank_mapping=MAPPING)
        assert addresses == [x.data_ptr() for x in (state._only.counted, model.log2phy, model.logcnt)]
        return load if self.is_single else load[0]


def _grows_and_shrinks(member, is_single):
    """Whether outputs stay the same, the maps with three ranks and two; load told, counted, and gone by."""
    rank = _Rank(member, is_single)
    load = rank.join() if member.rank == 1 else rank.grow()
    state, model = rank.state, rank.model
    assert state.expert_rearrangement_step == state.num_steps == 0
    grown = state.physical_to_logical_map.tolist()
    rank.forward()
    state.step()
    state.rearrange(rank_mapping={0: -1, 1: 0, 2: 1})
    assert (model.num_physical_experts, model.num_redundant_experts) == (6, 2)
    left, counted, last = state.physical_to_logical_map.tolist(), 0, None
    between = state._only.last_expert_load.tolist()
    if member.rank:
        rank.move_to("left")
        counted = rank.forward()
        state.step()
        state.rearrange()
        rank.forward()
        last = state._only.last_expert_load.tolist()
    for group in rank.groups.values():
        group.destroy()
    same = [torch.equal(rank.outputs[0], other) for other in rank.outputs]
    return same, grown, left, [load.tolist(), between, last], counted


@pytest.mark.parametrize("is_single", [True, False], ids=["one model", "models"])
def test_ranks_come_and_go(on_ranks, is_single):
    results = on_ranks(3, _grows_and_shrinks, is_single)
    chosen = [_tokens(rank, experts=4)[1] for rank in range(3)]
    for rank, (same, grown, left, loads, _) in enumerate(results):
        assert all(same)
        for load, ranks in zip(loads, ([0, 2], [0, 1, 2], [1, 2]), strict=True):
            together = torch.cat([chosen[one] for one in ranks]).transpose(0, 1).flatten(1)
            expected = [torch.bincount(row, minlength=4).tolist() for row in together]
            assert load == expected or (rank == 0 and ranks == [1, 2])
        assert (grown, left) == results[0][1:3]
        assert [len(row) for row in grown] == [9] * 3
        assert [len(row) for row in left] == [6] * 3
        assert all(set(row) == set(range(4)) for row in grown + left)
    counted, choices = [result[4] for result in results], 3 * 6 * 2
    # Each rank counts what reaches its slots, or what its tokens choose.
    assert sum(counted) == 2 * choices
    assert is_single or counted == [0, choices, choices]


def _goes_on_without(member, lost):
    """What the two others are told that go on without a rank; and whether tokens come out the same."""
    member.process_group()
    left = [rank for rank in range(3) if rank != lost]
    everybody, some = (
        GroupCoordinator(rows, member.rank, "gloo", True, group_name="ep", timeout=20)
        for rows in ([[0, 1, 2]], [[lost], left])
    )
    # Two slots each: 0 1 | 2 3 | 0 1.
    model = Toy(everybody, layers=3)
    state = EplbState.build(model, CPU, config(), ep_group=everybody)
    model.fill(state.physical_to_logical_map)
    given, told = _tokens(member.rank, experts=4), ""
    before = model(*given).tolist()
    if member.rank == lost:
        return before, before, told, None
    state.ep_group = model.group = some
    model.rank = some.rank_in_group
    mapping = {rank: left.index(rank) if rank in left else -1 for rank in range(3)}
    state.expert_load_window[0, 0] = 1
    try:
        state.rearrange(rank_mapping=mapping)
    except ConfigError as error:
        told, found = str(error), torch.tensor([[0, 1, 2, 3]] * 3)
        model.update_physical_experts_metadata(4, 2)
        model.fill(found)
        state.update_mapping(found)
        state.expert_load_window[0, 0] = 1
        state.rearrange()
    assert _agrees(model, state)
    after = model(*given).tolist()
    some.destroy()
    return before, after, told, state._only.last_expert_load[0].tolist()


@pytest.mark.parametrize(
    ("lost", "said"), [(0, ""), (1, "no rank has expert 2 of layer 0 any more; load its")]
)
def test_a_rank_that_is_lost_is_gone_on_without(on_ranks, lost, said):
    for rank, (before, after, told, load) in enumerate(on_ranks(3, _goes_on_without, lost)):
        assert before == after
        assert rank == lost or (said in told and bool(said) == bool(told))
        assert rank == lost or load == [1, 1, 1, 1]


class _Dies:
    """Moves weights, until layer 1 is prepared."""

    def __init__(self, mover):
        self.mover = mover
        self.commit, self.reserve, self.close = mover.commit, mover.reserve, mover.close

    def prepare(self, layer, moves, weights):
        if layer == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        self.mover.prepare(layer, moves, weights)


def _loses_a_rank(member):
    """What is in force after rank 1 died while layer 1 was moved."""
    with expert_group(member) as group:
        model = Toy(group, layers=3, experts=6, redundant=3)
        state = EplbState.build(model, CPU, config(), ep_group=group)
        model.fill(state.physical_to_logical_map)
        if member.rank == 1:
            make = state.make_mover
            state.make_mover = lambda *given: _Dies(make(*given))
        old = state.physical_to_logical_map.clone()
        load = torch.tensor([[50, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 50], [1, 50, 1, 1, 1, 1]])
        start = time.monotonic()
        with pytest.raises(PeerLostError) as caught:
            state.rearrange(global_expert_load=load)
        seconds = time.monotonic() - start
        changed = (state.physical_to_logical_map != old).any(dim=1).tolist()
        return changed, _agrees(model, state), caught.value.peers, caught.value.__notes__, seconds


def test_a_rank_that_dies_leaves_whole_layers_on_all_others(on_ranks):
    outcomes = on_ranks(3, _loses_a_rank, check=False)
    assert outcomes[1].exitcode == -signal.SIGKILL
    for outcome in (outcomes[0], outcomes[2]):
        assert not outcome.error
        changed, agrees, peers, notes, seconds = outcome.value
        assert changed == [True, False, False]
        assert agrees
        assert peers == (1,)
        assert "layers 0 have their new places" in notes[-1]
        assert seconds < 15


def _waits_for_a_rank(member):
    """What rank 0 is told when it steps once more than rank 1, and when it asks for what cannot be."""
    member.process_group()
    both, alone = (
        GroupCoordinator(rows, 0, "gloo", True, group_name="ep", timeout=1.0)
        for rows in ([[0, 1]], [[0], [1]])
    )
    peers = None
    if member.rank == 0:
        state = EplbState.build(Toy(alone), CPU, config(), ep_group=alone)
        load = torch.ones(2, 4, dtype=torch.int64)
        state.ep_group = both
        with pytest.raises(ConfigError, match="12 slots of 4 experts do not fit into maps for 6"):
            state.rearrange(global_expert_load=load, rank_mapping={0: 0})
        state = EplbState.build(Toy(both), CPU, config(), ep_group=both)
        with pytest.raises(PeerTimeoutError) as caught:
            state.step()
        peers = caught.value.peers
    member.meet("done")
    both.destroy()
    alone.destroy()
    return peers


def test_a_rank_that_does_not_come_is_named_in_time_unless_nothing_is_to_be_sent(on_ranks):
    assert on_ranks(2, _waits_for_a_rank)[0] == (1,)


@pytest.fixture
def group():
    with lone_group() as alone:
        yield alone


def test_a_state_of_tensors_is_one_for_one_model(group):
    model = Toy(group, layers=1)
    maps = [torch.tensor([[0, 1, 2, 3, 0, 1]]), torch.full((1, 4, 3), -1), torch.tensor([[2, 2, 1, 1]])]
    maps[1][0, :, 0] = torch.arange(4)
    maps[1][0, :2, 1] = torch.tensor([4, 5])
    load = torch.zeros(1, 6, dtype=torch.int32)
    window = torch.zeros(2, 1, 6, dtype=torch.int32)
    model.set_eplb_state(load, *maps[1:])
    model.fill(maps[0])
    state = ToyState(*maps, load, window, 1, 0, 2, 4, ep_group=group)
    assert (state.expert_load_window_size, state.expert_load_window_step) == (2, 1)
    assert state.expert_rearrangement_step_interval == 4
    assert state.physical_to_logical_map is maps[0]
    for number in range(2):
        load[0, 3] = 8 + number
        state.step(model)
    assert window[:, 0, 3].tolist() == [0, 0]
    assert state.model_states[""].last_expert_load.tolist() == [[0, 0, 0, 17]]
    assert state.expert_rearrangement_step == 0
    assert maps[2].tolist() == [[1, 1, 1, 3]]
    assert model.holds() == maps[0].tolist()
    named = ToyState(physical_to_logical_map=maps[0], logical_to_physical_map=maps[1], expert_load_pass=load,
                     logical_replica_count=maps[2], expert_load_window=window)  # fmt: skip
    assert named.expert_load_window_size == 2


def test_a_config_and_a_device_are_for_any_number_of_models(group):
    state = EplbState(config(window_size=7, step_interval=9, policy="default"), "cpu", ep_group=group)
    assert (state.expert_load_window_size, state.expert_rearrangement_step_interval) == (7, 9)
    assert state.expert_rearrangement_step == 7
    assert state.policy is DefaultEplbPolicy
    assert (state.is_async, state.async_worker, state.cuda_device_index) == (False, None, None)
    assert not state.rearrange_event.is_set()
    first, second = Toy(group), Toy(group, experts=5)
    state.add_model(first, ModelConfig("a"))
    state.add_model(second, ModelConfig("b"), model_name="the drafter")
    assert list(state.model_states) == ["hash of a", "hash of b"]
    assert [found.model_name for found in state.model_states.values()] == ["a", "the drafter"]
    assert second.log2phy.shape == (2, 5, 3)
    assert first.load.shape == (2, 6)
    with pytest.raises(ConfigError, match="a model with hash 'hash of a' was added before"):
        state.add_model(Toy(group), ModelConfig("a"))


def test_a_config_that_cannot_be_followed_is_refused():
    with pytest.raises(ConfigError, match="policy 'unheard of' is unknown; there are default"):
        EplbState(config(policy="unheard of"), "cpu")
    with pytest.raises(ConfigError, match="3 is no ParallelConfig, and no tensor with a map"):
        EplbState(3, "cpu")


def test_a_model_has_to_collect_its_weights(group):
    model = Toy(group)
    model.set_eplb_state = lambda *views: None
    with pytest.raises(ConfigError, match="expert_weights has 0 layers where the model has 2"):
        EplbState.build(model, CPU, config(), ep_group=group)


def test_initial_maps_are_those_of_routed_experts_and_then_the_first_again():
    assert EplbState.build_initial_global_physical_to_logical_map(3, 2) == [0, 1, 2, 0, 1]


def test_maps_have_room_for_all_slots_that_were_announced(group):
    def places(made):
        return made.logical_to_physical_map.shape[2]

    assert places(ToyState.build(Toy(group), CPU, config(), ep_group=group)) == 3
    elastic = config(enable_elastic_ep=True, elastic_ep_max_dp_size=3)
    assert places(ToyState.build(Toy(group), CPU, elastic, ep_group=group)) == 18 - 4 + 1
    assert places(ToyState.build(Toy(group), CPU, config(), ep_group=group, max_physical_experts=8)) == 5
    with pytest.raises(ConfigError, match="max_physical_experts=5 is less than the 6 slots there are"):
        ToyState.build(Toy(group), CPU, config(), ep_group=group, max_physical_experts=5)


def test_a_known_load_is_acted_upon_at_once(group):
    model = Toy(group, layers=1)
    old, load = torch.tensor([[0, 1, 2, 3, 0, 1]]), torch.tensor([[1, 1, 1, 9]])
    # Its weights are there already, as those of a rank that starts again.
    model.set_eplb_state(torch.zeros(1, 6), old, old)
    model.fill(old)
    state = ToyState.build(model, CPU, config(), load, old, ep_group=group)
    assert state.logical_replica_count.tolist() == model.logcnt.tolist() == [[1, 1, 1, 3]]
    assert model.holds() == state.physical_to_logical_map.tolist()
    assert state.expert_rearrangement_step == 0
    with pytest.raises(UsageError, match=r"global_expert_load is torch\.int32"):
        ToyState.build(model, CPU, config(), load.int(), old, ep_group=group)


def test_another_model_must_have_the_same_numbers(group):
    state = ToyState(config(), CPU, ep_group=group)
    state.add_model(Toy(group), ModelConfig())
    state.validate_ep_configuration(Toy(group))
    for error in (RuntimeError, ConfigError, EpConfigurationError):
        with pytest.raises(error, match="num_redundant_experts of the new model is 3; toy has 2"):
            state.validate_ep_configuration(Toy(group, redundant=3))
    with pytest.raises(EpConfigurationError, match="num_expert_groups of the new model is 2"):
        state.validate_ep_configuration(Toy(group, groups=2))


def test_a_state_may_begin_with_any_map_and_go_on_by_another(group):
    first = torch.tensor([[3, 2, 1, 0, 0, 0], [0, 1, 2, 3, 2, 2]])
    model = Toy(group)
    state = ToyState.from_mapping(model, ModelConfig(), CPU, config(), first, ep_group=group)
    assert state.physical_to_logical_map.tolist() == first.tolist()
    assert model.logcnt.tolist() == [[3, 1, 1, 1], [1, 1, 3, 1]]
    state.expert_load_window.fill_(1)
    state.update_mapping(first.flip(0), ModelConfig())
    assert model.logcnt.tolist() == [[1, 1, 3, 1], [3, 1, 1, 1]]
    assert not state.expert_load_window.any()
    state.update_mapping(torch.tensor([[0, 1, 2, 3, -1, -1]] * 2))
    assert model.log2phy[0].tolist() == [[0, -1, -1], [1, -1, -1], [2, -1, -1], [3, -1, -1]]
    for wrong, said in [
        ([[0, 1, 2, 3, 4, 0]] * 2, "has expert 4 in slot 4 of layer 0"),
        ([[0, 1, 2, 3, 0, 0], [0, 1, 2, 0, 0, 0]], "no slot with expert 3 in layer 1"),
        ([[0, 1, 2, 3, 0, 0]], r"is int64 \[1, 6\]; give integers \[2, 6\]"),
        ([[0, 1, 2, 3, 0, 0, 1, 1, 1, 1, 1, 1]] * 2, "12 slots of 4 experts do not fit"),
        ([[0, 1, 2, 3, 0, 0, 1]] * 2, "has 7 slots; give a multiple of the 6 that each rank has"),
        (0, "num_replicas=0 is wrong"),
    ]:
        with pytest.raises(ConfigError, match=said):
            state.update_mapping(torch.tensor(wrong))


def test_slots_of_more_ranks_are_empty_at_first(group):
    state, model = ToyState(config(), CPU, ep_group=group), Toy(group)
    state.add_model(model, ModelConfig(), max_physical_experts=12)
    first = state.physical_to_logical_map.tolist()
    state.reconfigure_physical_expert_slots(ModelConfig(), 12)
    assert state.physical_to_logical_map.tolist() == [row + [-1] * 6 for row in first]
    assert (model.num_physical_experts, model.num_local_physical_experts) == (12, 6)
    state.reconfigure_physical_expert_slots(None, 6)
    assert state.physical_to_logical_map.tolist() == first
    assert (model.num_physical_experts, model.num_redundant_experts) == (6, 2)
    for number in (8, 0, -6, 18):
        with pytest.raises(ConfigError):
            state.reconfigure_physical_expert_slots(None, number)
    assert state.physical_to_logical_map.tolist() == first


def test_closing_ends_what_moves_weights_and_what_runs_beside(group):
    state = ToyState.build(Toy(group), CPU, config(), ep_group=group)
    state.step(is_profile=True)
    mover = state._only.mover
    stopped = []
    state.async_worker = type("Worker", (), {"stop": lambda self: stopped.append(1)})()
    state.close()
    assert mover.calls[-1] == ("close", -1)
    assert stopped == [1]


def test_who_leaves_is_told_of_nothing_and_nobody_alone_can_be_told(group):
    for call in (EplbState.recv_state, lambda ep_group: EplbState.get_eep_state(config(), ep_group=ep_group)):
        with pytest.raises(ConfigError, match="every rank of the group waits to be told"):
            call(ep_group=group)
    state = ToyState.build(Toy(group), CPU, config(), ep_group=group)
    with pytest.raises(ConfigError, match="rank_mapping gives the new ranks"):
        state.rearrange(rank_mapping={0: -1})
