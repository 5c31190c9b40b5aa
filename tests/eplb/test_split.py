import numpy as np
import pytest
from hypothesis import given, settings

from tcomm.eplb.balance import balanced_slots
from tcomm.eplb.maps import balancedness, gpu_loads
from tcomm.eplb.shapes import Shape
from tcomm.eplb.split import split_tokens
from tcomm.errors import ConfigError
from tests.eplb.worlds import worlds


@settings(max_examples=60, deadline=None)
@given(worlds())
def test_shares_of_an_expert_sum_to_one_and_never_make_it_worse(world):
    shape, load = world
    phy2log = balanced_slots(load, shape)[0]
    share = split_tokens(load, phy2log, shape)
    assert (share >= 0).all()
    for slots, parts in zip(phy2log, share, strict=True):
        np.testing.assert_allclose(np.bincount(slots, parts, shape.num_experts), 1)
    before = balancedness(phy2log, load, shape.num_gpus)
    assert (balancedness(phy2log, load, shape.num_gpus, share) >= before * (1 - 1e-9)).all()


def test_a_hot_expert_fills_the_gpus_up_to_one_level():
    # Two replicas of expert 0, one of them beside the heavy expert 1.
    share = split_tokens(np.array([[10.0, 6, 0]]), np.array([[0, 1, 0, 2]]), Shape(3, 4, 1, 1, 2))
    np.testing.assert_allclose(share, [[0.2, 1, 0.8, 1]])
    beyond = split_tokens(np.array([[4.0, 9, 0]]), np.array([[0, 1, 0, 2]]), Shape(3, 4, 1, 1, 2))
    np.testing.assert_allclose(beyond, [[0, 1, 1, 1]])


def test_the_second_replica_on_a_gpu_takes_nothing():
    share = split_tokens(np.array([[8.0, 4]]), np.array([[0, 0, 0, 1]]), Shape(2, 4, 1, 1, 2))
    np.testing.assert_allclose(share, [[0.75, 0, 0.25, 1]])


def test_experts_make_room_for_one_another_over_sweeps():
    # A chain: expert 0 is shared with GPU 1, 1 with GPU 2, so that load flows along it.
    load = np.array([[12.0, 0.5, 0.5, 0.1]])
    phy2log, shape = np.array([[0, 3, 0, 1, 1, 2]]), Shape(4, 6, 1, 1, 3)
    once, often = (gpu_loads(phy2log, load, 3, split_tokens(load, phy2log, shape, n)).max() for n in (1, 20))
    assert often <= once
    heavy = np.array([[6.0, 6, 0.0, 0]])
    loads = gpu_loads(phy2log, heavy, 3, split_tokens(heavy, phy2log, shape))
    np.testing.assert_allclose(loads, [[4, 4, 4]], rtol=1e-3)


def test_maps_and_loads_that_are_none_are_refused():
    shape = Shape(2, 4, 1, 1, 2)
    with pytest.raises(ConfigError, match=r"phy2log is int64 \[1, 3\]"):
        split_tokens(np.ones((1, 2)), np.zeros((1, 3), int), shape)
    with pytest.raises(ConfigError, match="is nan"):
        split_tokens(np.array([[1, np.nan]]), np.array([[0, 1, 0, 1]]), shape)
