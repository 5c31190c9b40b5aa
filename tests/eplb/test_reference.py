import numpy as np

from tcomm.eplb.reference import reference_maps, reference_preserved
from tcomm.eplb.shapes import Shape
from tests.eplb.worlds import GOLDEN_COUNTS, GOLDEN_LOAD, GOLDEN_MAP, GOLDEN_SHAPE, assert_valid


def test_the_plain_plan_is_the_known_one():
    phy2log, log2phy, logcnt = reference_maps(GOLDEN_LOAD, GOLDEN_SHAPE)
    assert phy2log.tolist() == GOLDEN_MAP
    assert logcnt.tolist() == GOLDEN_COUNTS
    assert log2phy[0, 5].tolist() == [0, 2, -1, -1, -1]
    assert_valid(phy2log, log2phy, logcnt, GOLDEN_SHAPE)


def test_equal_loads_are_taken_in_order():
    phy2log, log2phy, _ = reference_maps(np.ones((1, 4)), Shape(4, 6, 1, 1, 2))
    # Experts 0 and 1 have two replicas; the others are heavier and are packed first.
    assert phy2log.tolist() == [[2, 0, 0, 3, 1, 1]]
    assert log2phy.tolist() == [[[1, 2, -1], [4, 5, -1], [0, -1, -1], [3, -1, -1]]]


def test_groups_that_nodes_do_not_divide_make_it_global():
    load = np.arange(12.0)[None]
    as_global = reference_maps(load, Shape(12, 16, 1, 1, 4))
    for got, wanted in zip(reference_maps(load, Shape(12, 16, 3, 2, 4)), as_global, strict=True):
        assert got.tolist() == wanted.tolist()


def test_experts_that_stay_keep_their_slots_and_the_others_fill_up():
    old = np.array([[0, 1, 2, 3, 0, -1]])
    new = np.array([[2, 0, 4, 0, 5, 3]])
    # GPU 0: 0 stays first and 2 third; GPU 1: 3 and 0 stay, 5 fills up.
    assert reference_preserved(old, new, 2).tolist() == [[1, 2, 0, 5, 3, 4]]
