import functools
import os
import signal
import threading
import time

import pytest
import torch

from tcomm.eplb.moving.making import make_mover
from tcomm.eplb.state.background import start_async_worker
from tcomm.eplb.state.state import EplbState
from tcomm.eplb.state.worker import Worker
from tcomm.errors import CollectiveMismatchError, ConfigError, PeerLostError, UsageError
from tests.eplb.state.toy import ModelConfig, Toy, config, expert_group, lone_group, skewed_choices

CPU = torch.device("cpu")


class _Slow:
    """A mover whose preparation takes its time."""

    def __init__(self, mover, seconds):
        self._mover, self._seconds = mover, seconds

    def prepare(self, *args):
        time.sleep(self._seconds)
        self._mover.prepare(*args)

    def settle(self, is_agreed):
        return self._mover.settle(is_agreed)

    def commit(self, *args):
        self._mover.commit(*args)

    def reserve(self, weights):
        self._mover.reserve(weights)

    def close(self):
        self._mover.close()


class SlowState(EplbState):
    """Prepares each layer late on one rank."""

    slow_rank, seconds = -1, 0.0

    def make_mover(self, group, weights):
        return _Slow(make_mover(group, weights), self.seconds * (group.rank_in_group == self.slow_rank))


def _made(group, kind=EplbState, layers=3, redundant=2, **given):
    model = Toy(group, layers=layers, experts=6, redundant=redundant)
    state = kind(config(**{"use_async": True, **given}), CPU, ep_group=group)
    state.add_model(model, ModelConfig())
    [only] = state.model_states.values()
    return state, only, model.fill(only.physical_to_logical_map)


def _changed(before, after):
    return [layer for layer, row in enumerate(before != after) if row.any()]


def _spin(seconds):
    """Without any call that gives the interpreter away."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def _beside(member):
    with expert_group(member) as group:
        SlowState.slow_rank, SlowState.seconds = 1, 0.05
        state, only, model = _made(group, SlowState, step_interval=1000)
        state.expert_rearrangement_step = 997
        tokens = torch.randn(6, 4, generator=torch.Generator().manual_seed(member.rank))
        choices = skewed_choices(6, 3, 6, member.rank)
        expected, first = model(tokens, choices), only.phy2log()
        switched, begun = [], None
        state.start_async_loop(is_profile=True)
        assert state.async_worker.thread.is_alive()
        for step in range(2000):
            old = only.phy2log()
            assert torch.equal(model(tokens, choices), expected)
            with torch.inference_mode(member.world_size == 4):
                state.step()
            switched += [(step, layer) for layer in _changed(old, only.phy2log())]
            if begun is None and state.rearrange_event.is_set():
                begun = step
                assert not switched
                with pytest.raises(UsageError, match=r"rearrange while experts .* drain_async"):
                    state.rearrange()
                with pytest.raises(UsageError, match="update_mapping while experts"):
                    state.update_mapping(torch.from_numpy(first))
            if begun is not None and not state.rearrange_event.is_set():
                break
            _spin(0.002)
        size = model.num_local_physical_experts
        mine = only.phy2log()[:, member.rank * size : (member.rank + 1) * size]
        assert model.holds() == mine.tolist()
        report = only.last_rearrangement
        assert report.before < report.after, report
        assert report.num_layers == len(switched)
        assert report.moving_seconds > 0.05 * len(switched)
        state.close()
        return begun, switched, only.phy2log().tolist(), first.tolist()


@pytest.mark.parametrize("world_size", [2, 4])
def test_layers_switch_one_a_step_and_on_all_ranks_in_the_same(on_ranks, world_size):
    results = on_ranks(world_size, _beside)
    begun, switched, new, old = results[0]
    assert results == [results[0]] * world_size
    assert begun == 2
    steps, layers = zip(*switched, strict=True)
    assert len(set(steps)) == len(steps)
    assert list(layers) == sorted(layers)
    assert new != old


def _drained(member):
    """What an asynchronous rearrangement comes to, and a synchronous one."""
    found = []
    with expert_group(member) as group:
        for use_async in (True, False):
            model = Toy(group, layers=3, experts=6, redundant=2)
            state = EplbState.build(model, CPU, config(use_async=use_async), ep_group=group)
            model.fill(state.physical_to_logical_map)
            state.start_async_loop()
            load = torch.tensor([[40, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 2, 3, 40, 5, 6]])
            state.rearrange(global_expert_load=load)
            state.drain_async()
            assert not state.rearrange_event.is_set()
            found.append(state.physical_to_logical_map.tolist())
            # Nothing changes the second time, and the end comes all the same.
            state.rearrange(global_expert_load=load)
            state.drain_async()
            assert state.physical_to_logical_map.tolist() == found[-1]
            state.close()
            state.close()
    assert found[0] == found[1]
    return threading.active_count()


def test_drained_it_comes_to_the_same_as_without_a_thread(on_ranks):
    on_ranks(2, _drained)


def _unequal(member):
    with expert_group(member) as group:
        SlowState.slow_rank, SlowState.seconds = 0, 0.2
        state, only, _ = _made(group, SlowState)
        first = only.phy2log()
        load = torch.tensor([[40, 1, 1, 1, 1, 1]] * 3)
        state.rearrange(global_expert_load=load)
        if member.rank == 1:
            state.num_steps += 1
        with pytest.raises(CollectiveMismatchError, match=r"rank 0: step 0, switch.*\n.*step 1, switch"):
            state.step()
        assert (only.phy2log() == first).all()
        state.num_steps = 7
        state.drain_async()
        assert (only.phy2log() != first).any()
        state.close()


def test_ranks_that_step_unequally_are_named_and_may_go_on(on_ranks):
    on_ranks(2, _unequal)


class MortalState(EplbState):
    """Of which one rank dies when it prepares its second layer."""

    def make_mover(self, group, weights):
        mover = make_mover(group, weights)
        if group.rank_in_group == 1:
            prepare = mover.prepare

            def prepare_or_die(layer, *args):
                if layer:
                    os.kill(os.getpid(), signal.SIGKILL)
                prepare(layer, *args)

            mover.prepare = prepare_or_die
        return mover


def _bereft(member):
    with expert_group(member) as group:
        state, only, model = _made(group, MortalState)
        first = only.phy2log()
        state.rearrange(global_expert_load=torch.tensor([[40, 1, 1, 1, 1, 1]] * 3))
        with pytest.raises(PeerLostError, match="rank 1 ") as caught:
            state.drain_async()
        size = model.num_local_physical_experts
        mine = only.phy2log()[:, member.rank * size : (member.rank + 1) * size]
        assert model.holds() == mine.tolist()
        state.close()
        return caught.value.peers, _changed(first, only.phy2log())


def test_a_death_in_the_middle_leaves_whole_layers(on_ranks):
    outcomes = on_ranks(4, _bereft, check=False)
    assert [outcome.exitcode for outcome in outcomes if outcome.rank == 1] == [-signal.SIGKILL]
    told = [outcome for outcome in outcomes if outcome.rank != 1]
    assert [outcome.value for outcome in told] == [((1,), [0])] * 3, told
    assert max(outcome.seconds for outcome in told) < 15


def _half_told(member):
    """In the step that switches the second layer the last rank tells rank 0 alone, and dies."""
    with expert_group(member) as group:
        state, only, model = _made(group, layers=3, redundant=3)
        first, ready = only.phy2log(), []

        def smallest(self, number):
            ready.append(number)
            if member.rank == 2 and number == 2:
                channel = group.control._arena.channel
                channel._peer_words = channel._peer_words[:1]
                type(channel).await_peers = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            return EplbState._smallest(self, number)

        state.async_worker = Worker(functools.partial(smallest, state), CPU, timeout=20)
        state.rearrange(global_expert_load=torch.tensor([[40, 1, 1, 1, 1, 1]] * 3))
        with pytest.raises(PeerLostError, match="rank 2 "):
            state.drain_async()
        size = model.num_local_physical_experts
        assert model.holds() == only.phy2log()[:, member.rank * size : (member.rank + 1) * size].tolist()
        assert not state.rearrange_event.is_set()
        state.num_steps = member.rank
        state.ep_group = group
        assert state.num_steps == 0
        state.close()
        return _changed(first, only.phy2log()), max(ready)


def test_who_did_not_hear_of_a_switch_makes_it_as_well(on_ranks):
    outcomes = on_ranks(3, _half_told, check=False)
    assert [outcome.value for outcome in outcomes[:2]] == [([0, 1], 2)] * 2, outcomes


def test_what_cannot_be_planned_is_raised_by_a_step():
    with lone_group() as group:
        state, only, model = _made(group)
        load = torch.tensor([[40, 1, 1, 1, 1, 1]] * 3)
        state.rearrange(global_expert_load=load - 2)
        with pytest.raises(ConfigError, match="the load of expert 1 in layer 0 is -1"):
            state.drain_async()
        state.rearrange(global_expert_load=load)
        state.drain_async()
        assert model.holds() == only.phy2log().tolist()
        assert only.last_expert_load is not None
        assert (only.phy2log()[:, :6] != torch.arange(6).numpy()).any() or only.last_rearrangement.num_layers
        state.close()


@pytest.mark.parametrize("use_async", [True, False])
def test_ctrl_c_comes_when_a_layer_has_weights_and_map(use_async):
    load = torch.tensor([[1, 40, 1, 1, 1, 1]] * 3)
    with lone_group() as group:
        state, only, model = _made(group, use_async=use_async)
        first, switch = only.phy2log(), only.switch_layer

        def interrupted(*args):
            signal.raise_signal(signal.SIGINT)
            switch(*args)

        only.switch_layer = interrupted
        if use_async:
            state.rearrange(global_expert_load=load)
        with pytest.raises(KeyboardInterrupt) as caught:
            state.drain_async() if use_async else state.rearrange(global_expert_load=load)
        assert use_async or "layers 0 have their new places" in caught.value.__notes__[0]
        assert _changed(first, only.phy2log()) == [0]
        assert model.holds() == only.phy2log().tolist()
        only.switch_layer = switch
        state.drain_async()
        assert _changed(first, only.phy2log()) == ([0, 1, 2] if use_async else [0])
        assert model.holds() == only.phy2log().tolist()
        state.close()


def test_a_model_without_layers_has_nothing_to_move():
    load = torch.zeros((0, 6), dtype=torch.int64)
    for use_async in (True, False):
        with lone_group() as group:
            state, only, _ = _made(group, layers=0, use_async=use_async)
            state.step(is_profile=True)
            state.rearrange(global_expert_load=load)
            state.drain_async()
            assert (only.last_rearrangement.num_layers, only.last_rearrangement.after) == (0, 1.0)
            state.close()


def test_closed_in_the_middle_nothing_is_under_way():
    with lone_group() as group:
        state, only, model = _made(group)
        state.rearrange(global_expert_load=torch.tensor([[40, 1, 1, 1, 1, 1]] * 3))
        assert state.rearrange_event.is_set()
        state.close()
        assert not state.rearrange_event.is_set()
        assert model.holds() == only.phy2log().tolist()
        with pytest.raises(UsageError, match=r"the worker of group 'ep:.*' is stopped"):
            state.rearrange(global_expert_load=torch.tensor([[1, 40, 1, 1, 1, 1]] * 3))


def test_without_a_thread_there_is_nothing_to_start_or_drain():
    with lone_group() as group:
        model = Toy(group, layers=1, experts=6, redundant=2)
        state = EplbState.build(model, CPU, config(), ep_group=group)
        state.start_async_loop()
        state.drain_async()
        assert state.async_worker is None
        with pytest.raises(UsageError, match="set use_async=True"):
            start_async_worker(state)
        state.close()
        beside, *_ = _made(group)
        thread = start_async_worker(beside)
        assert thread.is_alive()
        assert thread is start_async_worker(beside, is_profile=True)
        beside.close()
        assert not thread.is_alive()
