import itertools

import numpy as np
import pytest
from hypothesis import given, settings

from tcomm.eplb import bound
from tcomm.eplb.balance import balanced_slots
from tcomm.eplb.maps import balancedness
from tcomm.eplb.search import improved
from tcomm.eplb.shapes import Shape
from tcomm.errors import ConfigError
from tests.eplb.worlds import worlds


@settings(max_examples=80, deadline=None)
@given(worlds())
def test_no_plan_exceeds_it(world):
    shape, load = world
    found = improved(balanced_slots(load, shape)[0], load, shape)
    limit = bound.balancedness_bound(load, shape)
    assert (balancedness(found, load, shape.num_gpus) <= limit * (1 + 1e-9)).all()
    assert (limit[~load.any(axis=1)] == 1).all()


def test_nothing_at_all_exceeds_it():
    shape, load = Shape(3, 4, 1, 1, 2), np.array([[9.0, 2, 1], [1, 1, 1], [5, 5, 0]])
    maps = [m for m in itertools.product(range(3), repeat=4) if len(set(m)) == 3]
    evens = [balancedness(np.array([m] * 3), load, 2) for m in maps]
    limit = bound.balancedness_bound(load, shape)
    assert (np.max(evens, axis=0) <= limit + 1e-12).all()
    # Expert 0 has at most two replicas: 4.5 is below the mean of 6, and so is no limit.
    assert limit.tolist() == [1, 1, 1]


def test_a_hot_expert_limits_it():
    assert bound.balancedness_bound(np.array([[9.0, 1, 1]]), Shape(3, 4, 1, 1, 4)) == pytest.approx(
        11 / 4 / 4.5
    )


def test_groups_limit_it_where_they_stay_on_nodes():
    load = np.array([[8.0, 1, 1, 1]])
    on_nodes = bound.balancedness_bound(load, Shape(4, 8, 4, 2, 4))
    # The best is 8 + 1 on one node of two GPUs.
    assert on_nodes == pytest.approx((11 / 4) / 4.5)
    # A group's expert can have no more replicas than its node has slots to spare.
    alone = bound.balancedness_bound(np.array([[9.0, 1, 1, 1]]), Shape(4, 8, 2, 2, 8))
    assert alone == pytest.approx((12 / 8) / 3)


def test_many_groups_have_a_limit_too(monkeypatch):
    load = np.random.default_rng(0).lognormal(0, 1, (20, 12))
    exact = bound.balancedness_bound(load, Shape(12, 24, 12, 4, 4))
    monkeypatch.setattr(bound, "_MOST_PARTITIONS", 0)
    loose = bound.balancedness_bound(load, Shape(12, 24, 12, 4, 4))
    assert (loose >= exact - 1e-12).all()
    assert (loose < 1).any()
    np.testing.assert_allclose(loose, exact, rtol=0.1)


def test_a_load_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="give numbers from 0 to"):
        bound.balancedness_bound(np.array([[-1.0, 1]]), Shape(2, 2))
