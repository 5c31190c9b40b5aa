import re

import numpy as np
import pytest
import torch

from tcomm.eplb.state.elastic import (
    RankChange,
    SharedState,
    rank_change,
    receive_state,
    renumbered,
    share_state,
)
from tcomm.eplb.state.meeting import Meeting
from tcomm.errors import CollectiveMismatchError, ConfigError
from tests.eplb.state.toy import expert_group


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
        ({0: 0, 2: 1}, 2, 2, "rank_mapping has ranks [0, 2]; give a new one, or -1, for each of 0 to 1"),
        ({0: 0}, 2, 2, "has ranks [0]"),
        ({0: 1, 1: 1}, 2, 2, "gives the new ranks [1, 1]; give different ones of 0 to 1"),
        ({0: -1, 1: -1}, 2, 2, "gives the new ranks [-1, -1]"),
        ({0: 1, 1: -1}, 2, 2, "gives the new ranks [1, -1]; give different ones of 0 to 0"),
        ({0: 0, 1: 4}, 2, 4, "gives the new ranks [0, 4]; give different ones of 0 to 3"),
        ({0: 0, 1: -2}, 2, 4, "gives the new ranks [0, -2]"),
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


def _tells(member):
    with expert_group(member) as group:
        meeting, rank = Meeting(group), member.rank
        if rank == 0:
            told = receive_state(meeting)
        else:
            loads = [torch.full((2, 3), rank), torch.full((1, 2), 10 * rank)]
            maps = [torch.arange(8).view(2, 4) % 3, torch.tensor([[1, 0]])]
            told = share_state(meeting, 4, SharedState(loads, maps, 2, rank == 1))
        found = [x.tolist() for x in told.loads + told.maps]
        with pytest.raises(ConfigError, match="every rank of the group waits to be told"):
            receive_state(meeting)
        if rank == 0:
            with pytest.raises(CollectiveMismatchError, match="rank 0: joins, share"):
                receive_state(meeting)
        else:
            with pytest.raises(CollectiveMismatchError, match=f"rank {rank}: step {rank}, share, 1 models"):
                share_state(meeting, rank, SharedState(loads[:1], maps[:1], 2, True))
        return found, told.slots_per_rank, told.is_single


def test_who_joins_is_told_by_the_first_who_knows(on_ranks):
    for found, slots_per_rank, is_single in on_ranks(3, _tells):
        assert found == [[[3] * 3] * 2, [[30, 30]], [[0, 1, 2, 0], [1, 2, 0, 1]], [[1, 0]]]
        assert slots_per_rank == 2
        assert is_single
