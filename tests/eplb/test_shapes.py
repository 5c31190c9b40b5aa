import numpy as np
import pytest

from tcomm.eplb.shapes import Shape, checked_load, checked_map
from tcomm.errors import ConfigError


@pytest.mark.parametrize(
    ("numbers", "rule"),
    [
        ((8, 7, 1, 1, 7), "7 replicas are fewer than 8 experts"),
        ((8, 9, 1, 1, 2), r"num_replicas \(9\) must be a multiple of num_gpus \(2\)"),
        ((8, 12, 3, 1, 2), r"the number of experts \(8\) must be a multiple of num_groups \(3\)"),
        ((8, 12, 4, 2, 3), r"num_gpus \(3\) must be a multiple of num_nodes \(2\)"),
        ((0, 12, 1, 1, 2), "num_experts=0 is wrong"),
        ((8, 12, 1, 1, 0), "num_gpus=0 is wrong"),
        ((8, 12, 1, 1, 1.5), "num_gpus=1.5 is wrong"),
        ((8, 12, True, 1, 2), "num_groups=True is wrong"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_with_the_rule(numbers, rule):
    with pytest.raises(ConfigError, match=rule):
        Shape(*numbers)


def test_nodes_that_do_not_divide_groups_mean_one_node():
    shape = Shape(8, 12, 4, 3, 4)
    assert not shape.is_hierarchical
    assert shape.planned() == Shape(8, 12, 1, 1, 4) == shape.everywhere()
    kept = Shape(8, 12, 4, 2, 4)
    assert kept.is_hierarchical
    assert kept.planned() is kept
    assert kept.everywhere() == shape.everywhere()
    assert kept.slots_per_gpu == 3
    assert kept.by_group(np.arange(16).reshape(2, 8))[1].tolist() == [[8, 9], [10, 11], [12, 13], [14, 15]]
    assert kept.by_group(np.zeros((0, 8))).shape == (0, 4, 2)


@pytest.mark.parametrize(
    ("load", "rule"),
    [
        (np.ones(3), r"of shape \[3\] is wrong; give \[layers, experts\]"),
        (np.ones((3, 0)), r"of shape \[3, 0\] is wrong"),
        (np.ones((1, 2), complex), "dtype complex128 is wrong"),
        (np.array([["a", "b"]]), "give real numbers"),
        (np.array([[1.0, np.nan]]), "expert 1 in layer 0 is nan"),
        (np.array([[1.0, np.inf]]), "expert 1 in layer 0 is inf"),
        (np.array([[1], [-2]]), "expert 0 in layer 1 is -2"),
        (np.array([[1e39]]), r"is 1e\+39; give numbers from 0 to 3.4e\+38"),
    ],
)
def test_a_load_that_makes_no_sense_is_refused(load, rule):
    with pytest.raises(ConfigError, match=rule):
        checked_load(load, np.float64)


def test_a_load_becomes_floats():
    assert checked_load(np.array([[1, 2]], np.int32), np.float32).dtype == np.float32
    assert checked_load(np.array([[True, False]]), np.float64).tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("given", "whole", "rule"),
    [
        (np.zeros((1, 3), int), True, r"the map is int64 \[1, 3\]; give integers \[1, 4\]"),
        (np.zeros((1, 4)), True, r"the map is float64"),
        (np.array([[0, 1, 2, 0]]), True, "expert 2 in slot 2 of layer 0; give 0 to 1"),
        (np.array([[0, 1, -1, 0]]), True, "expert -1 in slot 2"),
        (np.array([[0, 1, -2, 0]]), False, "expert -2 in slot 2 of layer 0; give -1 to 1"),
        (np.array([[0, 0, 0, 0]]), True, "has no slot with expert 1 in layer 0"),
    ],
)
def test_a_map_that_is_none_is_refused(given, whole, rule):
    with pytest.raises(ConfigError, match=rule):
        checked_map("the map", given, 1, Shape(2, 4, 1, 1, 2), whole=whole)


def test_a_map_becomes_long_and_may_have_holes_when_it_need_not_be_whole():
    shape = Shape(2, 4, 1, 1, 2)
    assert checked_map("the map", np.array([[0, 1, 1, 0]], np.int32), 1, shape).dtype == np.int64
    assert checked_map("the map", np.array([[0, -1, -1, 0]]), 1, shape, whole=False).tolist() == [
        [0, -1, -1, 0]
    ]
