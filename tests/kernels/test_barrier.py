import time

import pytest
import torch

from tcomm.errors import CollectiveMismatchError, PeerTimeoutError
from tcomm.kernels.barrier import arrival_barrier
from tcomm.memory.control import Word, arrival_index
from tcomm.signature import CallDescription
from tests.kernels.test_all_reduce import use_tiles
from tests.test_algorithms import mistake


def _words_of_the_docstring(member):
    arena = member.arena()
    arena.set_epoch(6)
    member.meet("set")
    arrival_barrier(arena)
    signature = CallDescription("barrier", algorithm="triton:arrival").signature
    words = arena.channel.words
    return [words[arrival_index(0, 1, 0, source)] == 7 << 32 | signature for source in (0, 1)]


def test_the_example_of_the_docstring(on_ranks):
    assert on_ranks(2, _words_of_the_docstring) == [[True, True]] * 2


def _nobody_passes_before_the_last_comes(member):
    arena = member.arena()
    passed = []
    for late in range(member.world_size):
        started = time.monotonic()
        if member.rank == late:
            time.sleep(0.15)
        arrival_barrier(arena)
        passed.append(time.monotonic() - started)
        member.meet(f"passed {late}")
    return min(passed)


@pytest.mark.parametrize("world_size", [2, 3])
def test_nobody_passes_before_the_last_comes(on_ranks, world_size):
    assert min(on_ranks(world_size, _nobody_passes_before_the_last_comes)) > 0.14


def _between_collectives(member):
    use_tiles(64)
    arena, found = member.arena(), []
    for seed in range(6):
        arrival_barrier(arena)
        found.append(mistake(member, arena, seed, "triton:two_shot", "sum", torch.float32, (33,)))
    assert not any(found), "\n".join(filter(None, found))
    return arena.channel.words[Word.EPOCH]


def test_a_barrier_counts_as_a_call(on_ranks):
    assert on_ranks(2, _between_collectives) == [12, 12]


def _disagree(member):
    arena = member.arena()
    call = CallDescription("barrier" if member.rank else "something else")
    with pytest.raises(CollectiveMismatchError) as caught:
        arrival_barrier(arena, call=call)
    arrival_barrier(arena)
    return "rank 0: something else\n  rank 1: barrier" in str(caught.value)


def test_ranks_that_disagree_are_told_and_go_on(on_ranks):
    assert on_ranks(2, _disagree) == [True, True]


def _one_never_comes(member):
    arena = member.arena()
    if member.rank == 0:
        with pytest.raises(PeerTimeoutError) as caught:
            arrival_barrier(arena, timeout=0.3)
        member.meet("end")
        return caught.value.peers
    member.meet("end")
    return None


def test_a_rank_that_never_comes_is_named(on_ranks):
    assert on_ranks(2, _one_never_comes)[0] == (1,)
