import itertools
import time

import pytest
import torch

from tcomm.errors import PeerTimeoutError
from tcomm.kernels import all_reduce
from tcomm.memory.control import Word, dead_word
from tests.kernels.test_all_reduce import use_tiles
from tests.kernels.test_device import at_epoch
from tests.test_algorithms import TRITON, mistake, reduce_by

LL = "triton:one_shot_ll"


def _odd_numbers_of_halves(member):
    use_tiles(64)
    arena = member.arena(staging_bytes=64 * 1024)
    cases = itertools.product([1, 2, 3, 63, 64, 65, 127, 129], [torch.float16, torch.bfloat16, torch.int32])
    found = [
        mistake(member, arena, seed, LL, "sum", dtype, (numel,)) for seed, (numel, dtype) in enumerate(cases)
    ]
    assert not any(found), "\n".join(filter(None, found))


def test_two_halves_share_a_lane_and_the_last_may_be_alone(on_ranks):
    on_ranks(2, _odd_numbers_of_halves)


def _what_a_lane_holds(member):
    use_tiles(64)
    arena = member.arena(staging_bytes=64 * 1024)
    values = [[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]]
    reduce_by(LL, torch.tensor(values[member.rank]), arena)
    epoch, layout = arena.channel.words[Word.EPOCH], arena.staging.layout
    lanes, slot = arena.channel.lanes[epoch & 1], layout.lane_slot_bytes // 8
    for source in range(member.world_size):
        bits = torch.tensor(values[source]).view(torch.int32).tolist()
        expected = [epoch << 32 | b & 0xFFFFFFFF for b in bits] + [dead_word(epoch - 1)]
        assert list(lanes[source * slot : source * slot + 4]) == expected, source


def test_a_lane_is_the_epoch_and_32_bits_of_its_source(on_ranks):
    on_ranks(2, _what_a_lane_holds)


def _writes_into(member, arena, region, name):
    """Whether a call by that algorithm changes a region of this rank's staging."""
    member.meet(f"{name}/begin")
    before = region.clone()
    member.meet(f"{name}/cloned")
    assert not mistake(member, arena, 1, name, shape=(500,))
    member.meet(f"{name}/done")
    return not torch.equal(region, before)


def _regions(member):
    use_tiles(8192)
    arena = member.arena(staging_bytes=64 * 1024)
    at_epoch(member, arena, 8)
    staging, offset = arena.staging.buffer.local, arena.staging.layout.half_offset
    writers = {name for name in TRITON if _writes_into(member, arena, staging[:offset], name)}
    return writers, _writes_into(member, arena, staging[offset:], LL)


def test_lanes_are_written_by_their_own_protocol_alone_which_writes_nothing_else(on_ranks):
    assert on_ranks(2, _regions) == [({LL}, False)] * 2


def _data_after_the_arrival_word(member):
    use_tiles(64)
    arena, found = member.arena(), []
    push = all_reduce.push_lanes

    def late(*args):
        time.sleep(0.02)
        push(*args)

    for seed in range(6):
        all_reduce.push_lanes = late if seed % 2 == member.rank else push
        found.append(mistake(member, arena, seed, LL, shape=(150,)))
    assert not any(found), "\n".join(filter(None, found))


def test_an_arrival_word_that_overtakes_its_data_is_not_enough(on_ranks):
    on_ranks(2, _data_after_the_arrival_word)


def _lanes_that_never_come(member):
    use_tiles(64)
    arena = member.arena()
    if member.rank == 1:
        all_reduce.push_lanes = lambda *_: None
    with pytest.raises(PeerTimeoutError) as caught:
        reduce_by(LL, torch.ones(5), arena, timeout=[0.5, 10.0][member.rank])
    return caught.value.peers, str(caught.value)


def test_lanes_that_never_come_end_in_a_timeout_that_names_their_source(on_ranks):
    (peers, told), _ = on_ranks(2, _lanes_that_never_come)
    assert peers == (1,)
    assert "all_reduce #1 of group 'arena' timed out after 0.5 s on rank 0: rank 1 is silent" in told
