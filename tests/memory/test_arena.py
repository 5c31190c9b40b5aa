import os

import pytest
import torch

from tcomm.memory.control import CONTROL_BYTES, MAGIC, Word


def _see_each_other(member):
    arena = member.arena()
    mine = arena.staging.buffer.local
    mine[:8] = member.rank + 1
    member.meet("written")
    seen = [int(arena.staging.buffer.peer(r)[0]) for r in range(member.world_size)]
    table = arena.staging.buffer.table.tolist()
    assert table[member.rank] == mine.data_ptr()
    assert all(arena.channel.pages[r].words[Word.MAGIC] == MAGIC for r in range(member.world_size))
    member.meet("read")
    arena.close("done")
    return seen


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_sees_every_ranks_memory(on_ranks, world_size):
    assert on_ranks(world_size, _see_each_other) == [list(range(1, world_size + 1))] * world_size


def _leaves_no_trace(member, directory):
    before = os.listdir(directory), len(os.listdir("/proc/self/fd"))
    member.meet("before")
    for round_ in range(3):
        arena = member.arena(name=f"round{round_}", directory=directory)
        arena.close("done")
        del arena
    member.meet("closed")
    after = os.listdir(directory), len(os.listdir("/proc/self/fd"))
    return before, after


def test_names_and_descriptors_are_given_back(on_ranks, tmp_path):
    for before, after in on_ranks(2, _leaves_no_trace, str(tmp_path)):
        assert after == before


def _keep_the_old(member):
    arena = member.arena(staging_bytes=1 << 20)
    old = arena.staging
    address = old.buffer.local.data_ptr()
    old.buffer.local[-1] = 77
    arena.grow(2 << 20, 20.0)
    assert arena.staging.layout.nbytes == 2 << 20
    assert (old.buffer.local.data_ptr(), int(old.buffer.local[-1])) == (address, 77)
    member.meet("done")
    arena.close("done")


def test_growing_leaves_old_staging_to_those_who_hold_it(on_ranks):
    on_ranks(2, _keep_the_old)


def _view_bounds(member):
    arena = member.arena()
    buffer = arena.staging.buffer
    view = buffer.peer(member.rank, (2, 3), torch.float32, offset=64)
    assert view.data_ptr() == buffer.local.data_ptr() + 64
    with pytest.raises(IndexError, match="24 bytes at offset 1048560 pass the end of a buffer of 1048576"):
        buffer.peer(member.rank, (2, 3), torch.float32, offset=(1 << 20) - 16)
    assert arena.control.nbytes == CONTROL_BYTES
    arena.close("done")


def test_a_view_past_the_end_is_refused(on_ranks):
    on_ranks(1, _view_bounds)
