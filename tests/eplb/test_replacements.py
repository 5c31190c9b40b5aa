import numpy as np
import pytest

from tcomm.eplb.replacements import best_replacement, peak_elsewhere
from tests.eplb.steps import layers_of
from tests.eplb.worlds import gpu_sums


def test_the_highest_elsewhere_passes_over_the_slot_itself():
    phy2log = np.array([[0, 1, 0, 2, 1, 0], [0, 0, 0, 0, 1, 2]])
    values = np.array([[5.0, 2, 7, 9, 3, 7], [1, 4, 2, 3, 9, 9]])
    assert peak_elsewhere(phy2log, values).tolist() == [
        [7, 3, 7, -np.inf, 2, 7],
        [4, 3, 4, 4, -np.inf, -np.inf],
    ]


def test_a_hot_expert_takes_the_place_of_a_cold_replica():
    # Expert 0 alone is above the mean; expert 3 has two replicas and hardly any load.
    layers = layers_of([[0, 1, 2, 3, 3, 1]], [[12.0, 4, 4, 1]], 3)
    step = best_replacement(layers, None, 6)
    assert (step.hot_slot[0], step.other_slot[0]) in {(0, 3), (0, 4)}
    slots = layers.phy2log.copy()
    slots[0, step.other_slot[0]] = 0
    after = gpu_sums(slots, layers.load, 3)
    assert after.max() == pytest.approx(layers.peak[0] - step.gain[0])
    assert step.gain[0] > 0


def test_the_last_replica_of_an_expert_is_never_replaced():
    layers = layers_of([[0, 1, 2, 3]], [[12.0, 4, 4, 1]], 2)
    assert best_replacement(layers, None, 4).gain[0] == -np.inf


def test_gpus_that_are_away_and_moves_beyond_the_budget_are_none():
    where = [[0, 1, 2, 3, 3, 2]]
    layers = layers_of(where, [[12.0, 4, 4, 1]], 3, where)
    assert best_replacement(layers, None, 0).gain[0] == -np.inf
    assert best_replacement(layers, None, 1).gain[0] > 0
    away = np.array([[False, True, False]])
    assert best_replacement(layers, away, 1).other_slot[0] // 2 == 2
    assert best_replacement(layers, np.array([[False, True, True]]), 1).gain[0] == -np.inf


def test_a_second_replica_on_a_gpu_that_has_the_expert_is_no_move():
    where = [[0, 1, 2, 3, 3, 1]]
    step = best_replacement(layers_of(where, [[12.0, 4, 4, 1]], 3, where), None, 0)
    assert (step.hot_slot[0], step.other_slot[0]) == (1, 4)
    assert step.gain[0] == pytest.approx(4 / 2 - 4 / 3)
