import pytest
import torch

from tcomm.eplb.state.elastic import SharedState, receive_state, share_state
from tcomm.eplb.state.meeting import Meeting
from tcomm.errors import CollectiveMismatchError, ConfigError
from tests.eplb.state.toy import expert_group


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
