import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcomm.eplb import maps
from tcomm.eplb.reference import reference_preserved
from tcomm.eplb.shapes import Shape
from tests.eplb.worlds import assert_valid, gpu_sums, random_map

SHAPE = Shape(6, 8, 1, 1, 4)
MAP = np.array([[0, 1, 2, 3, 4, 5, 0, 0]])
LOAD = np.array([[6.0, 1, 2, 3, 4, 5]])


def test_the_initial_map_repeats_the_first_experts():
    assert maps.initial_map(SHAPE).tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert maps.initial_map(Shape(2, 6, 1, 1, 3)).tolist() == [0, 1, 0, 1, 0, 1]
    assert maps.initial_map(Shape(6, 12, 4, 3, 4)).tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert maps.initial_map(Shape(4, 6, 2, 2, 2)).tolist() == [0, 1, 0, 2, 3, 2]


def test_counts_of_replicas_pass_over_holes():
    assert maps.replica_counts(np.array([[0, 2, 2, -1], [1, 1, 1, 0]]), 3).tolist() == [[1, 0, 2], [1, 3, 0]]
    assert maps.replica_counts(np.zeros((0, 4), int), 3).shape == (0, 3)


def test_logical_maps_list_slots_in_order():
    log2phy, counts = maps.logical_maps(np.array([[2, 0, -1, 2, 0, 2], [1, 1, 0, 2, -1, -1]]), 3)
    assert log2phy.tolist() == [
        [[1, 4, -1], [-1, -1, -1], [0, 3, 5]],
        [[2, -1, -1], [0, 1, -1], [3, -1, -1]],
    ]
    assert counts.tolist() == [[2, 0, 3], [1, 2, 1]]
    wide, _ = maps.logical_maps(MAP, 6, 5)
    assert wide[0, 0].tolist() == [0, 6, 7, -1, -1]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 3))
def test_logical_maps_are_those_of_a_valid_plan(seed, num_layers):
    phy2log = random_map(np.random.default_rng(seed), num_layers, SHAPE)
    assert_valid(phy2log, *maps.logical_maps(phy2log, 6), SHAPE)


def test_the_load_of_a_gpu_is_that_of_its_replicas():
    assert maps.gpu_loads(MAP, LOAD, 4).tolist() == [[3, 5, 9, 4]]
    np.testing.assert_allclose(maps.gpu_loads(MAP, LOAD, 4), gpu_sums(MAP, LOAD, 4))
    share = np.array([[0.5, 1, 1, 1, 1, 1, 0.5, 0]])
    assert maps.gpu_loads(MAP, LOAD, 4, share).tolist() == [[4, 5, 9, 3]]


def test_balancedness_is_mean_over_peak_and_1_without_load():
    load = np.concatenate([LOAD, np.zeros((1, 6))])
    twice = np.repeat(MAP, 2, axis=0)
    assert maps.balancedness(twice, load, 4).tolist() == [pytest.approx(21 / 4 / 9), 1]
    share = np.array([[1.0, 1, 1, 1, 1, 1, 0, 0]])
    assert maps.balancedness(MAP, LOAD, 4, share).tolist() == [pytest.approx(21 / 4 / 9)]


def test_holders_are_the_gpus_with_a_replica():
    held = maps.holders(MAP, 6, 4)
    assert held.shape == (1, 4, 6)
    assert [sorted(np.flatnonzero(row)) for row in held[0]] == [[0, 1], [2, 3], [4, 5], [0]]


def test_groups_on_nodes_are_told_from_groups_on_several():
    shape = Shape(4, 4, 2, 2, 2)
    assert maps.keeps_groups_on_nodes(np.array([[2, 3, 1, 0]]), shape)
    assert not maps.keeps_groups_on_nodes(np.array([[2, 3, 1, 0], [0, 2, 1, 3]]), shape)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 3), st.sampled_from([1, 2, 4, 8]))
def test_experts_that_stay_keep_their_slots(seed, num_layers, gpus):
    generator = np.random.default_rng(seed)
    new, old = (random_map(generator, num_layers, SHAPE) for _ in range(2))
    old[generator.random(old.shape) < 0.1] = -1
    source = maps.preserved_slots(old, new, gpus)
    np.testing.assert_array_equal(source, reference_preserved(old, new, gpus))
    moved = np.take_along_axis(new, source, axis=1)
    by_gpu = [part.reshape(num_layers, gpus, 8 // gpus) for part in (new, moved)]
    np.testing.assert_array_equal(*(np.sort(part, axis=2) for part in by_gpu))
