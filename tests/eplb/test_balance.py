import numpy as np
import pytest
from hypothesis import given, settings

from tcomm.eplb.balance import balanced_maps, balanced_slots, numbered_slots
from tcomm.eplb.reference import reference_maps
from tcomm.eplb.shapes import Shape
from tcomm.errors import ConfigError
from tests.eplb.worlds import GOLDEN_COUNTS, GOLDEN_LOAD, GOLDEN_MAP, GOLDEN_SHAPE, assert_valid, worlds


def test_the_known_plan():
    phy2log, log2phy, logcnt = balanced_maps(GOLDEN_LOAD, GOLDEN_SHAPE)
    assert phy2log.tolist() == GOLDEN_MAP
    assert logcnt.tolist() == GOLDEN_COUNTS
    assert_valid(phy2log, log2phy, logcnt, GOLDEN_SHAPE)


def _random_case(generator):
    nodes, per_node = generator.integers(1, 5), generator.integers(1, 5)
    gpus, groups = nodes * per_node, nodes * generator.integers(1, 4) + (generator.random() < 0.3)
    experts = groups * generator.integers(1, 7)
    slots = gpus * (-(-experts // gpus) + generator.integers(0, 4))
    shape = Shape(int(experts), int(slots), int(groups), int(nodes), int(gpus))
    size = (2, shape.num_experts)
    kind = generator.integers(4)
    if kind == 0:
        return shape, generator.integers(0, 5, size)
    return shape, generator.lognormal(0, kind, size).astype(np.float32 if kind == 1 else np.float64)


def test_a_thousand_random_plans_equal_the_plain_ones():
    generator = np.random.default_rng(7)
    hierarchical = 0
    for _ in range(1000):
        shape, load = _random_case(generator)
        hierarchical += shape.is_hierarchical and shape.num_nodes > 1
        for got, wanted in zip(balanced_maps(load, shape), reference_maps(load, shape), strict=True):
            np.testing.assert_array_equal(got, wanted)
    assert 300 < hierarchical < 900


@settings(max_examples=60, deadline=None)
@given(worlds())
def test_every_plan_is_valid_and_as_promised(world):
    shape, load = world
    phy2log, log2phy, logcnt = balanced_maps(load, shape)
    assert_valid(phy2log, log2phy, logcnt, shape)
    planned = shape.planned()
    slots_of_node = shape.num_replicas // planned.num_nodes
    for layer, slots in enumerate(phy2log):
        nodes = slots.reshape(planned.num_nodes, slots_of_node)
        groups = [set(node // (shape.num_experts // planned.num_groups)) for node in nodes]
        assert sum(map(len, groups)) == planned.num_groups
        for node in nodes:
            share = load[layer] / logcnt[layer]
            again = np.unique(node[logcnt[layer][node] > 1])
            if len(again):
                without = load[layer][again] / (logcnt[layer][again] - 1)
                assert share[node].max() <= without.min() * (1 + 1e-6)
    if shape.num_replicas == shape.num_experts:
        assert all(sorted(slots) == list(range(shape.num_experts)) for slots in phy2log)


def test_loads_that_are_equal_as_float32_are_equal():
    load, shape = np.array([[1, 1 + 1e-12]]), Shape(2, 3, 1, 1, 3)
    assert balanced_maps(load, shape)[2].tolist() == reference_maps(load, shape)[2].tolist() == [[2, 1]]


def test_no_layers_are_no_trouble():
    phy2log, log2phy, logcnt = balanced_maps(np.zeros((0, 12)), GOLDEN_SHAPE)
    assert (phy2log.shape, log2phy.shape, logcnt.shape) == ((0, 16), (0, 12, 5), (0, 12))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 1e39])
def test_a_load_that_is_none_is_refused_by_name(bad):
    load = np.ones((2, 12))
    load[1, 3] = bad
    with pytest.raises(ConfigError, match=r"expert 3 in layer 1 is .*give numbers from 0 to 3.4e\+38"):
        balanced_maps(load, GOLDEN_SHAPE)


def test_slots_come_with_the_numbers_of_their_replicas():
    phy2log, numbers, logcnt = balanced_slots(np.array([[6.0, 1, 1, 1]]), Shape(4, 6, 1, 1, 3))
    assert logcnt.tolist() == [[3, 1, 1, 1]]
    assert phy2log.tolist() == [[0, 1, 0, 2, 0, 3]]
    assert numbers.tolist() == [[0, 0, 1, 0, 2, 0]]
    slots = numbered_slots(phy2log, numbers[:, ::-1], Shape(4, 6, 1, 1, 3))
    assert slots[0, 0].tolist() != [0, 2, 4]
    assert numbered_slots(phy2log, numbers, Shape(4, 6, 1, 1, 3))[0].tolist() == [
        [0, 2, 4], [1, -1, -1], [3, -1, -1], [5, -1, -1],
    ]  # fmt: skip
