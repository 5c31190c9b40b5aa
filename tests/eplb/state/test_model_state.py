import re

import numpy as np
import pytest
import torch

from tcomm.eplb.state.model_state import EplbModelState
from tcomm.errors import ConfigError
from tests.eplb.state.toy import GatheringMover, Toy


def _state(most_slots=6, own=False, num_ranks=2):
    model = Toy(num_ranks=num_ranks)
    return EplbModelState.of_model(
        model, np.array([[0, 1, 2, 3, 0, 1]] * 2), name="toy", window_size=3, most_slots=most_slots,
        counts_own_slots=own, device=torch.device("cpu"),
    )  # fmt: skip


def test_maps_of_a_model_at_first():
    state = _state()
    assert state.physical_to_logical_map.tolist() == [[0, 1, 2, 3, 0, 1]] * 2
    assert state.logical_to_physical_map.tolist() == [[[0, 4, -1], [1, 5, -1], [2, -1, -1], [3, -1, -1]]] * 2
    assert state.logical_replica_count.tolist() == [[2, 2, 1, 1]] * 2
    assert (state.num_ranks, state.num_experts, state.title) == (2, 4, "toy ")
    assert state.expert_load_pass.shape == (2, 6)
    assert state.expert_load_window.shape == (3, 2, 6)
    assert state.expert_load_pass.dtype == state.expert_load_window.dtype == torch.int32
    assert state.physical_to_logical_map.dtype == torch.int64
    own = _state(own=True)
    assert own.expert_load_pass.shape == (2, 3)
    assert own.expert_load_window.shape == (3, 2, 3)


def test_a_map_on_the_host_is_a_copy():
    state = _state()
    state.phy2log()[:] = 9
    assert state.phy2log().tolist() == [[0, 1, 2, 3, 0, 1]] * 2


def test_a_model_that_wants_to_know_is_told_how_many_slots_there_are():
    state = _state(most_slots=12)
    state.adopt(np.array([[0, 1, 2, 3, 0, 1, -1, -1, -1]] * 2))
    state.tell_model()
    assert (state.model.num_physical_experts, state.model.num_local_physical_experts) == (9, 3)
    state.model = None
    state.tell_model()


def test_a_pass_is_recorded_and_forgotten():
    state = _state()
    state.expert_load_pass[1, 2] = 5
    state.record(1)
    state.forget_pass()
    assert not state.expert_load_pass.any()
    assert state.expert_load_window.sum(dim=(1, 2)).tolist() == [0, 5, 0]


def test_loads_are_those_of_all_slots_or_of_this_ranks():
    state, own = _state(), _state(own=True)
    state.expert_load_window[0, 0] = torch.tensor([1, 2, 3, 4, 5, 6])
    assert state.expert_loads(1).tolist() == [[6, 8, 3, 4], [0] * 4]
    own.expert_load_window[0, 0] = torch.tensor([1, 2, 3])
    assert own.expert_loads(1).tolist() == [[2, 3, 0, 1], [0] * 4]
    assert own.expert_loads(0).tolist() == [[1, 2, 3, 0], [0] * 4]


def test_a_layer_switches_whole_and_in_place():
    state = _state()
    state.expert_load_window.fill_(1)
    layer = state.layer(1, torch.tensor(True))
    addresses = [x.data_ptr() for x in (layer.logical_to_physical_map, layer.logical_replica_count)]
    state.switch_layer(1, np.array([3, 1, 3, 2, -1, 0]))
    assert layer.logical_to_physical_map.tolist() == [[5, -1, -1], [1, -1, -1], [3, -1, -1], [0, 2, -1]]
    assert layer.logical_replica_count.tolist() == [1, 1, 1, 2]
    assert state.physical_to_logical_map.tolist() == [[0, 1, 2, 3, 0, 1], [3, 1, 3, 2, -1, 0]]
    assert state.expert_load_window.sum(dim=(0, 2)).tolist() == [18, 0]
    again = state.layer(1, torch.tensor(True))
    assert addresses == [x.data_ptr() for x in (again.logical_to_physical_map, again.logical_replica_count)]
    assert layer.expert_load_view.data_ptr() == state.expert_load_pass[1].data_ptr()
    with pytest.raises(ConfigError, match="expert 3 of layer 0 has 4 slots, and 3 places"):
        state.switch_layer(0, np.array([3, 3, 3, 3, 1, 0]))


def test_more_slots_stay_where_the_first_ones_were():
    state = _state(most_slots=9)
    maps = state.logical_to_physical_map
    before = [x.data_ptr() for x in (state.counted, state.physical_to_logical_map)]
    assert (state.counted.shape, state.expert_load_pass.shape) == ((2, 9), (2, 6))
    state.counted.fill_(1)
    state.adopt(np.array([[0, 1, 2, 3, 0, 1, -1, -1, 2]] * 2))
    assert state.logical_to_physical_map is maps
    assert maps[0, 2].tolist() == [2, 8, -1, -1, -1, -1]
    assert before == [x.data_ptr() for x in (state.counted, state.expert_load_pass)][:1] + before[1:]
    assert state.physical_to_logical_map.data_ptr() == before[1]
    assert state.expert_load_pass.shape == (2, 9)
    assert not state.counted.any()
    assert state.expert_load_window.shape == (3, 2, 9)
    assert state.num_ranks == 3
    state.adopt(np.array([[0, 1, 2, 3, 0, 1]] * 2))
    assert state.expert_load_window.shape == (3, 2, 6)


def test_more_than_there_is_room_for_is_refused():
    said = "9 slots of 4 experts do not fit into maps for 6, which stay where they are"
    with pytest.raises(ConfigError, match=said):
        _state().adopt(np.array([[0, 1, 2, 3, 0, 1, 2, 3, 0]] * 2))
    with pytest.raises(ConfigError, match=re.escape("give max_physical_experts")):
        _state(own=True).check_room(7)
    _state(most_slots=9).check_room(9)


def test_tensors_of_somebody_else_grow_where_they_can():
    given = _state(most_slots=9, own=True)
    state = EplbModelState(
        given.physical_to_logical_map[:, :6].clone(), given.logical_to_physical_map,
        given.logical_replica_count, given.expert_load_pass, given.expert_load_window, slots_per_rank=3,
        counts_own_slots=True,
    )  # fmt: skip
    with torch.inference_mode():
        state.adopt(np.array([[0, 1, 2, 3, 0, 1, 3, 3, 2]] * 2))
    assert state.physical_to_logical_map.shape == (2, 9)
    assert not state.physical_to_logical_map.is_inference()
    assert state.logical_replica_count[1].tolist() == [2, 2, 2, 3]
    assert state.counted is state.expert_load_pass


def test_what_moves_weights_is_closed_once():
    state = _state()
    state.mover = mover = GatheringMover(None)
    state.close()
    state.close()
    assert mover.calls == [("close", -1)]
