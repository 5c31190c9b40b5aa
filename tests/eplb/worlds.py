"""Shapes, loads and maps that tests of planning share, and what must hold of every plan."""

import numpy as np
from hypothesis import strategies as st

from tcomm.eplb.shapes import Shape

GOLDEN_SHAPE = Shape(12, 16, 4, 2, 8)
GOLDEN_LOAD = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
GOLDEN_MAP = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]
GOLDEN_COUNTS = [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]]


@st.composite
def shapes(draw, global_too=True):
    nodes = draw(st.integers(1, 3))
    gpus = nodes * draw(st.integers(1, 4))
    groups = nodes * draw(st.integers(1, 3))
    if global_too and draw(st.booleans()):
        groups = nodes + 1
    experts = groups * draw(st.integers(1, 5))
    slots = -(-experts // gpus) + draw(st.integers(0, 3))
    return Shape(experts, slots * gpus, groups, nodes, gpus)


@st.composite
def worlds(draw, global_too=True):
    """A shape and a load [L, E] for it: skewed, equal or with layers that have none."""
    shape = draw(shapes(global_too))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = (draw(st.integers(0, 4)), shape.num_experts)
    kind = draw(st.sampled_from(["lognormal", "integers", "equal", "one", "some idle"]))
    load = generator.lognormal(0, draw(st.floats(0.1, 3)), size)
    if kind == "integers":
        load = generator.integers(0, 6, size).astype(float)
    elif kind == "equal":
        load = np.full(size, 7.0)
    elif kind == "one":
        load = np.zeros(size)
        load[:, draw(st.integers(0, shape.num_experts - 1))] = 1e30
    elif kind == "some idle":
        load[::2] = 0
    return shape, load


def random_map(generator, num_layers, shape):
    """[L, P] with every expert somewhere."""
    rest = generator.integers(0, shape.num_experts, (num_layers, shape.num_replicas - shape.num_experts))
    whole = np.concatenate([np.tile(np.arange(shape.num_experts), (num_layers, 1)), rest], axis=1)
    return generator.permuted(whole, axis=1)


def assert_valid(phy2log, log2phy, logcnt, shape):
    """What holds of every plan, whatever the load."""
    num_layers, num_slots = phy2log.shape
    assert num_slots == shape.num_replicas
    assert log2phy.shape[:2] == logcnt.shape == (num_layers, shape.num_experts)
    for slots, places, counts in zip(phy2log, log2phy, logcnt, strict=True):
        assert np.bincount(slots, minlength=shape.num_experts).tolist() == counts.tolist()
        assert counts.min() >= 1
        assert counts.sum() == num_slots
        for expert, count in enumerate(counts):
            assert sorted(places[expert, :count]) == np.flatnonzero(slots == expert).tolist()
            assert (places[expert, count:] == -1).all()


def gpu_sums(phy2log, load, num_gpus):
    """[L, G], by loops."""
    loads = np.zeros((len(phy2log), num_gpus))
    size = phy2log.shape[1] // num_gpus
    for layer, slots in enumerate(phy2log.tolist()):
        for slot, expert in enumerate(slots):
            loads[layer, slot // size] += load[layer, expert] / slots.count(expert)
    return loads
