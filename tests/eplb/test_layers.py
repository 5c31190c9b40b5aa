import numpy as np

from tcomm.eplb.layers import best_step
from tests.eplb.steps import layers_of

MAP = [[0, 1, 2, 3], [3, 2, 1, 0]]
LOAD = [[1.0, 2, 3, 5], [5, 1, 1, 1]]


def test_loads_and_the_busiest_gpu():
    layers = layers_of(MAP, LOAD, 2)
    assert layers.slot_load.tolist() == [[1, 2, 3, 5], [1, 1, 1, 5]]
    assert layers.gpu_load.tolist() == [[3, 8], [2, 6]]
    assert layers.hottest.tolist() == [1, 1]
    assert layers.peak.tolist() == [8, 6]
    assert layers.hot_slots().tolist() == [[2, 3], [2, 3]]
    assert layers.slots_per_gpu == 2
    assert layers.per_slot(np.array([7, 8])).tolist() == [7, 7, 8, 8]


def test_a_swap_keeps_loads_right():
    layers = layers_of(MAP, LOAD, 2)
    layers.swap(np.array([0, 1]), np.array([3, 0]), np.array([0, 3]))
    layers.look()
    assert layers.phy2log.tolist() == [[3, 1, 2, 0], [0, 2, 1, 3]]
    assert layers.gpu_load.tolist() == [[7, 4], [6, 2]]
    assert layers.hottest.tolist() == [0, 0]
    loads = layers.gpu_load.copy()
    layers.weigh()
    assert layers.gpu_load.tolist() == loads.tolist()


def test_a_part_has_the_rows_asked_for():
    part = layers_of(MAP, LOAD, 2, MAP).part(np.array([False, True]))
    assert part.index.tolist() == [1]
    assert part.phy2log.tolist() == [MAP[1]]
    assert part.held.shape == (1, 2, 4)
    assert layers_of(MAP, LOAD, 2).part([0]).held is None


def test_moves_are_slots_whose_expert_was_on_another_gpu():
    layers = layers_of([[0, 2, 1, 3], [3, 1, 2, 0]], LOAD, 2, MAP)
    assert layers.moved().tolist() == [[False, True, True, False]] * 2
    assert layers.spent.tolist() == [2, 2]
    missing = layers.missing(np.array([[0, 3], [3, 0]]))
    assert missing[0].tolist() == [[False, False, True, True], [True, True, False, False]]
    assert missing[1].tolist() == [[False, False, True, True], [True, True, False, False]]


def test_the_best_step_has_the_lowest_peak_or_gains_most_for_a_move():
    layers = layers_of(MAP[:1], LOAD[:1], 2, MAP[:1])
    peaks = np.array([[[8.0, 7, 6, 5], [9, 4.5, 8, 8]]])
    step = best_step(peaks.copy(), None, layers, 4)
    assert (step.gain.tolist(), step.hot_slot.tolist(), step.other_slot.tolist()) == ([3.5], [3], [1])
    costs = np.array([[[1, 1, 1, 1], [1, 2, 1, 1]]])
    step = best_step(peaks.copy(), costs, layers, 4)
    assert (step.gain.tolist(), step.hot_slot.tolist(), step.other_slot.tolist()) == ([3], [2], [3])
    # Undoing a move is worth no more than a free step.
    costs[0, 1, 1] = -1
    assert best_step(peaks.copy(), costs, layers, 4).gain.tolist() == [3.5]


def test_a_step_beyond_the_moves_that_are_left_is_none():
    layers = layers_of(MAP[:1], LOAD[:1], 2, MAP[:1])
    peaks, costs = np.full((1, 2, 4), 5.0), np.full((1, 2, 4), 2)
    assert best_step(peaks.copy(), costs, layers, 1).gain.tolist() == [-np.inf]
    assert best_step(peaks.copy(), costs, layers, 2).gain.tolist() == [3]
