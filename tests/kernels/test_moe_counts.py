import pytest
import torch

from tcomm.errors import PeerTimeoutError
from tcomm.kernels.moe_counts import open_call, take_counts
from tcomm.signature import CallDescription

CALL = CallDescription("turn", "rows")


def _swaps(member):
    arena, told = member.arena(64 << 10), []
    for turn in range(3):
        counts = torch.tensor([100 * turn + 10 * member.rank + peer for peer in range(member.world_size)])
        received = torch.empty_like(counts)
        epoch = open_call(counts, arena, CALL, 20.0)
        take_counts(received, arena, CALL, 20.0, epoch)
        told.append((epoch, received.tolist()))
    member.meet("swapped")
    # What a peer never wrote is no count: the words are those of the call before the last.
    epoch = open_call(counts, arena, CALL, 20.0, counted=False)
    received = torch.full_like(counts, -1)
    with pytest.raises(PeerTimeoutError, match="turn #4"):
        take_counts(received, arena, CALL, 20.0, epoch)
    return told, received.tolist()


def test_each_rank_gets_what_every_rank_counted_for_it_and_nothing_stale(on_ranks):
    for rank, (told, stale) in enumerate(on_ranks(3, _swaps)):
        assert told == [(t + 1, [100 * t + 10 * source + rank for source in range(3)]) for t in range(3)]
        assert stale == [0, 0, 0]
