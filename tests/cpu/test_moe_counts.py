import pytest
import torch

from tcomm.cpu.moe_counts import swap_counts
from tcomm.errors import DecodeError
from tcomm.signature import CallDescription

CALL = CallDescription("turn", "rows")


def _swaps(member):
    arena, told = member.arena(64 << 10), []
    for turn in range(3):
        epoch = arena.channel.begin(CALL, 20.0)
        counts = torch.tensor([100 * turn + 10 * member.rank + peer for peer in range(member.world_size)])
        told.append(swap_counts(arena, epoch, CALL, counts).tolist())
        arena.channel.finish(epoch)
    member.meet("swapped")
    # What a peer never wrote is no count.
    epoch = arena.channel.begin(CALL, 20.0)
    none = torch.empty(0, dtype=torch.int64)
    with pytest.raises(DecodeError, match=r"counts of call #4 are of calls \[2, 2, 2\]"):
        swap_counts(arena, epoch, CALL, none)
    return told


def test_each_rank_gets_what_every_rank_counted_for_it(on_ranks):
    told = on_ranks(3, _swaps)
    assert told == [
        [[100 * turn + 10 * source + rank for source in range(3)] for turn in range(3)] for rank in range(3)
    ]
