import re

import numpy as np
import pytest

from tcomm.eplb.moving.rank_mapping import RankChange, rank_change, renumbered, widen_maps
from tcomm.errors import ConfigError

OLD, NEW = np.array([[0, 1, 2, 3, 4, 5]]), np.array([[5, 4, 1, 0]])


def test_without_a_mapping_all_stays():
    change = rank_change(None, 3, 3)
    assert change == RankChange((0, 1, 2), 3, True)
    assert change.is_none
    assert change.moving_size == 3
    with pytest.raises(ConfigError, match="on 2 ranks and the group has 3; give rank_mapping"):
        rank_change(None, 2, 3)


def test_some_leave_and_the_old_ones_move():
    change = rank_change({0: 1, 1: -1, 2: 0}, 3, 3)
    assert (change.num_ranks, change.moving_size, change.is_before) == (2, 3, True)
    assert change.old_ranks == (2, 0)
    assert not change.is_none


def test_some_join_and_the_new_ones_move():
    change = rank_change({0: 0, 1: 2}, 2, 4)
    assert (change.num_ranks, change.moving_size, change.is_before) == (4, 4, False)
    assert change.old_ranks == (0, -1, 1, -1)


def test_some_are_lost_and_the_others_move():
    change = rank_change({0: 0, 1: -1, 2: 1}, 3, 2)
    assert (change.num_ranks, change.moving_size, change.is_before) == (2, 2, False)


@pytest.mark.parametrize(
    ("mapping", "num_old", "size", "complaint"),
    [
        (
            {0: 0, 2: 1},
            2,
            2,
            "={0: 0, 2: 1}; give a dict with a new rank, or -1, for each old one of 0 to 1",
        ),
        ({0: 0}, 2, 2, "rank_mapping={0: 0}; give a dict"),
        ({0: 1, 1: 1}, 2, 2, "gives the new ranks [1, 1]; give different ones of 0 to 1"),
        ({0: -1, 1: -1}, 2, 2, "gives the new ranks [-1, -1]"),
        ({0: 1, 1: -1}, 2, 2, "gives the new ranks [1, -1]; give different ones of 0 to 0"),
        ({0: 0, 1: 4}, 2, 4, "gives the new ranks [0, 4]; give different ones of 0 to 3"),
        ({0: 0, 1: -2}, 2, 4, "gives the new ranks [0, -2]"),
        ([0, 1], 2, 2, "rank_mapping=[0, 1]; give a dict"),
        ({0: 0.0, 1: 1}, 2, 2, "rank_mapping={0: 0.0, 1: 1}; give a dict"),
        ({0: 0, "1": 1}, 2, 2, "give a dict"),
        ({}, 0, 2, "gives the new ranks []"),
    ],
)
def test_a_mapping_that_is_none_is_refused(mapping, num_old, size, complaint):
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        rank_change(mapping, num_old, size)


def test_slots_go_with_their_rank():
    phy2log = np.array([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]])
    assert renumbered(phy2log, [1, -1, 0], 2).tolist() == [[4, 5, 0, 1], [1, 0, 5, 4]]
    assert renumbered(phy2log, [0, 1, 3], 4).tolist()[0] == [0, 1, 2, 3, -1, -1, 4, 5]
    assert renumbered(phy2log, [0, 1, 2], 3).tolist() == phy2log.tolist()
    assert renumbered(phy2log[:0], [0, -1, 1], 2).shape == (0, 4)
    with pytest.raises(ConfigError, match=r"a map of \[2, 6\] does not divide among 4 ranks"):
        renumbered(phy2log, [0, 1, 2, 3], 4)


def test_no_mapping_leaves_maps_alone():
    assert widen_maps(OLD, NEW, None, 3) == (OLD, NEW)


def test_ranks_that_leave_get_slots_without_experts():
    old, new = widen_maps(OLD, NEW, {0: 1, 1: -1, 2: 0}, 3)
    assert old is OLD
    assert new.tolist() == [[1, 0, -1, -1, 5, 4]]
    assert widen_maps(OLD, NEW, {0: 0, 1: -1, 2: -1}, 3)[1].tolist() == [[5, 4, 1, 0] + [-1] * 8]


def test_ranks_that_join_had_none():
    old, new = widen_maps(NEW, OLD, {0: 2, 1: 0}, 3)
    assert new is OLD
    assert old.tolist() == [[1, 0, -1, -1, 5, 4]]
    assert widen_maps(OLD, NEW, {0: 0, 1: 1, 2: 2}, 4)[0].tolist() == [[0, 1, 2, 3, 4, 5, -1, -1]]


def test_what_lost_ranks_had_is_left_out():
    old, new = widen_maps(OLD, NEW, {0: 0, 1: -1, 2: 1}, 2)
    assert new is NEW
    assert old.tolist() == [[0, 1, 4, 5]]


def test_mappings_and_maps_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"rank_mapping=\[0, 1\]; give a dict"):
        widen_maps(OLD, NEW, [0, 1], 3)
    with pytest.raises(ConfigError, match=r"a map of \[1, 3\] does not divide among 2 ranks"):
        widen_maps(OLD, np.array([[0, 1, 2]]), {0: 0, 1: 1, 2: -1}, 3)
