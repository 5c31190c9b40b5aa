import itertools

import numpy as np
import pytest

from tcomm.eplb.shapes import Shape
from tcomm.eplb.swaps import best_double_swap, best_swap, swap_in_pairs
from tests.eplb.steps import layers_of
from tests.eplb.worlds import gpu_sums, random_map

SHAPE = Shape(10, 12, 1, 1, 4)


def _random(seed, held=False):
    generator = np.random.default_rng(seed)
    phy2log, load = random_map(generator, 5, SHAPE), generator.lognormal(0, 1, (5, 10))
    return layers_of(phy2log, load, 4, phy2log if held else None)


def _after(layers, row, *pairs):
    """The load of the GPUs that a swap touches, computed anew."""
    slots = layers.phy2log[row].copy()
    for one, other in pairs:
        slots[[one, other]] = slots[[other, one]]
    loads = gpu_sums(slots[None], layers.load[row][None], 4)[0]
    return max(loads[slot // 3] for pair in pairs for slot in pair)


@pytest.mark.parametrize("held", [False, True])
def test_the_best_swap_is_the_best_of_all(held):
    layers = _random(1, held)
    step = best_swap(layers, None, 12)
    for row in range(5):
        hot = layers.hot_slots()[row]
        cold = [slot for slot in range(12) if slot not in hot]
        best = min(_after(layers, row, pair) for pair in itertools.product(hot, cold))
        chosen = (step.hot_slot[row], step.other_slot[row])
        assert chosen[0] in hot
        assert _after(layers, row, chosen) == pytest.approx(layers.peak[row] - step.gain[row])
        if not held:
            assert layers.peak[row] - step.gain[row] == pytest.approx(best)


def test_gpus_that_are_away_are_left_alone():
    layers = _random(2)
    away = np.ones((5, 4), bool)
    away[np.arange(5), (layers.hottest + 1) % 4] = False
    for step in (best_swap(layers, away, 12), *best_double_swap(layers, away)):
        gains = step.gain > 0
        assert gains.any()
        assert (step.other_slot[gains] // 3 == (layers.hottest[gains] + 1) % 4).all()


def test_moves_are_counted_and_kept_to():
    layers = layers_of([[0, 1, 2, 3, 4, 5]], [[9.0, 6, 1, 1, 1, 1]], 3, [[0, 1, 2, 3, 4, 5]])
    assert best_swap(layers, None, 1).gain[0] <= 0
    assert best_swap(layers, None, 2).gain[0] > 0
    # The other GPU had expert 1 before, and the busiest had 2: the swap brings both back.
    back = layers_of([[0, 1, 2, 3]], [[9.0, 6, 1, 1]], 2, [[0, 2, 1, 3]])
    assert back.spent.tolist() == [2]
    assert best_swap(back, None, 2).gain[0] == 5


def test_two_slots_for_two_are_better_than_any_one():
    # 10 + 7 + 1 against 8 + 6 + 2: one for one only overshoots or does nothing.
    layers = layers_of([[0, 1, 2, 3, 4, 5]], [[10.0, 7, 1, 8, 6, 2]], 2)
    single = best_swap(layers, None, 6)
    first, second = best_double_swap(layers, None)
    assert first.gain.tolist() == second.gain.tolist()
    assert first.gain[0] == 1
    assert single.gain[0] <= 1
    pairs = [(int(step.hot_slot[0]), int(step.other_slot[0])) for step in (first, second)]
    slots = np.array([0, 1, 2, 3, 4, 5])
    for one, other in pairs:
        slots[[one, other]] = slots[[other, one]]
    assert gpu_sums(slots[None], layers.load, 2).tolist() == [[17, 17]]


def test_gpus_of_one_slot_have_no_pairs():
    layers = layers_of([[0, 1]], [[3.0, 1]], 2)
    assert [step.gain.tolist() for step in best_double_swap(layers, None)] == [[0], [0]]


@pytest.mark.parametrize("nodes", [1, 2])
def test_pairs_of_gpus_swap_at_once_and_no_gpu_goes_above_the_busiest_of_its_pair(nodes):
    layers = _random(3)
    before = layers.phy2log.copy()
    peaks = layers.gpu_load.reshape(5 * nodes, 4 // nodes).max(axis=1)
    assert swap_in_pairs(layers, nodes)
    np.testing.assert_allclose(layers.gpu_load, gpu_sums(layers.phy2log, layers.load, 4))
    after = layers.gpu_load.reshape(5 * nodes, 4 // nodes).max(axis=1)
    assert (after <= peaks + 1e-12).all()
    assert (after < peaks).any()
    by_node = [np.sort(part.reshape(5 * nodes, 12 // nodes), axis=1) for part in (before, layers.phy2log)]
    np.testing.assert_array_equal(*by_node)
    while swap_in_pairs(layers, nodes):
        pass
    assert not swap_in_pairs(layers, nodes)


def test_a_gpu_alone_has_no_partner():
    assert not swap_in_pairs(layers_of([[0, 1]], [[3.0, 1]], 1), 1)
