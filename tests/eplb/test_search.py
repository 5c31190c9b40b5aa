import numpy as np
import pytest
from hypothesis import given, settings

from tcomm.eplb.balance import balanced_slots
from tcomm.eplb.maps import balancedness, gpu_loads, keeps_groups_on_nodes, logical_maps
from tcomm.eplb.search import Budget, improved
from tcomm.eplb.shapes import Shape
from tests.eplb.worlds import assert_valid, worlds

SHAPE = Shape(64, 80, 1, 1, 16)


def _load(seed=0, sigma=1.0):
    return np.random.default_rng(seed).lognormal(0, sigma, (4, 64))


@settings(max_examples=60, deadline=None)
@given(worlds())
def test_a_search_never_ends_worse_and_leaves_a_valid_map(world):
    shape, load = world
    start = balanced_slots(load, shape)[0]
    found = improved(start, load, shape)
    assert_valid(found, *logical_maps(found, shape.num_experts), shape)
    before, after = (gpu_loads(part, load, shape.num_gpus).max(axis=1) for part in (start, found))
    assert (after <= before * (1 + 1e-9)).all()
    assert keeps_groups_on_nodes(found, shape.planned())


def test_a_search_finds_much_that_packing_does_not():
    load = _load()
    start = balanced_slots(load, SHAPE)[0]
    kept = start.copy()
    found = improved(start, load, SHAPE)
    assert balancedness(start, load, 16).mean() < 0.99
    assert balancedness(found, load, 16).mean() > 0.995
    np.testing.assert_array_equal(start, kept)
    np.testing.assert_array_equal(found, improved(start, load, SHAPE))
    np.testing.assert_allclose(
        balancedness(improved(start, load * 1e6, SHAPE), load, 16), balancedness(found, load, 16)
    )


def test_counts_of_replicas_change_where_swaps_do_not_help():
    # One replica a GPU: nothing can be gained by a swap.
    shape, load = Shape(2, 4, 1, 1, 4), np.array([[9.0, 3]])
    assert np.bincount(improved(np.array([[0, 0, 1, 1]]), load, shape)[0]).tolist() == [3, 1]


def test_rounds_are_kept_to():
    load = _load()
    start = balanced_slots(load, SHAPE)[0]
    none = Budget(80, np.zeros(4))
    np.testing.assert_array_equal(improved(start, load, SHAPE, none, rounds=0), start)
    assert ((improved(start, load, SHAPE, none, rounds=1) != start).sum(axis=1) <= 2).all()


def _copies(old, new):
    """[L]: slots whose expert was not on their GPU."""
    return [
        sum(len(set(after) - set(before)) for before, after in zip(*gpus, strict=True))
        for gpus in zip(old.reshape(4, 16, 5).tolist(), new.reshape(4, 16, 5).tolist(), strict=True)
    ]


@pytest.mark.parametrize("most", [0, 1, 2, 5])
def test_no_more_moves_than_the_budget(most):
    load, start = _load(1), balanced_slots(_load(), SHAPE)[0]
    found = improved(start, load, SHAPE, Budget(most, np.zeros(4)))
    assert max(_copies(start, found)) == most


def test_a_price_ends_a_layer_where_moves_no_longer_pay():
    load, start = _load(1), balanced_slots(_load(), SHAPE)[0]
    peak = gpu_loads(start, load, 16).max(axis=1)
    free, dear, absurd = (
        improved(start, load, SHAPE, Budget(80, price)) for price in (0 * peak, 0.02 * peak, peak)
    )
    copies = [_copies(start, part) for part in (free, dear, absurd)]
    assert sum(copies[0]) > sum(copies[1]) > sum(copies[2]) == 0
    gain = (peak - gpu_loads(dear, load, 16).max(axis=1)) / peak
    assert (gain >= 0.02 * np.array(copies[1])).all()
