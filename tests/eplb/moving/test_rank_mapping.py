import numpy as np
import pytest

from tcomm.eplb.moving.rank_mapping import widen_maps
from tcomm.errors import ConfigError

OLD, NEW = np.array([[0, 1, 2, 3, 4, 5]]), np.array([[5, 4, 1, 0]])


def test_no_mapping_leaves_maps_alone():
    assert widen_maps(OLD, NEW, None, 3) == (OLD, NEW)


def test_ranks_that_leave_get_slots_without_experts():
    old, new = widen_maps(OLD, NEW, {0: 1, 1: -1, 2: 0}, 3)
    assert old is OLD
    assert new.tolist() == [[1, 0, -1, -1, 5, 4]]


def test_ranks_that_join_had_none():
    old, new = widen_maps(NEW, OLD, {0: 2, 1: 0}, 3)
    assert new is OLD
    assert old.tolist() == [[1, 0, -1, -1, 5, 4]]
    assert widen_maps(OLD, NEW, {0: 0, 1: 1, 2: 2}, 4)[0].tolist() == [[0, 1, 2, 3, 4, 5, -1, -1]]


@pytest.mark.parametrize(
    ("mapping", "text"),
    [
        ([0, 1], "give a dict from old rank to new rank"),
        ({}, "must have the keys 0 to N - 1"),
        ({0: 0, 2: 1}, "must have the keys 0 to N - 1"),
        ({0: 0, 1: 1, 2: 2, 3: 3}, "a group of 3 ranks"),
        ({0: 0, 1: 2, 2: -1}, "the ranks that stay are numbered 0 to 1"),
        ({0: -1, 1: -1, 2: -1}, "nobody stays"),
        ({0: 1, 1: 1}, "two ranks become the same one"),
        ({0: 1, 1: -1}, "where ranks join, the 2 old ones all stay"),
        ({0: 1, 1: 3}, "where ranks join, the 2 old ones all stay, as some of 0 to 2"),
        ({0: 0, 1: -1, 2: -1}, ""),
    ],
)
def test_wrong_mappings_are_refused(mapping, text):
    if not text:
        assert widen_maps(OLD, NEW, mapping, 3)[1].tolist() == [[5, 4, 1, 0] + [-1] * 8]
        return
    with pytest.raises(ConfigError, match=text):
        widen_maps(OLD, NEW, mapping, 3)


def test_a_map_that_its_ranks_do_not_share_is_refused():
    with pytest.raises(ConfigError, match=r"the new map of \[1, 3\] does not divide among 2 ranks"):
        widen_maps(OLD, np.array([[0, 1, 2]]), {0: 0, 1: 1, 2: -1}, 3)
