import itertools
import random

import pytest
import torch

from tcomm.errors import CapabilityError
from tcomm.kernels import exchange
from tcomm.kernels.exchange import LAUNCHERS
from tcomm.memory.arena import open_arena
from tcomm.parts import exchange_parts, gather_parts
from tests.kernels.test_all_reduce import delay_at_random, poison, use_tiles
from tests.moves import MOVED_DTYPES, TRITON, every, exchange_by, mistakes_of_moves


def _numbers_of_the_docstrings(member):
    arena = member.arena()
    swapped, whole = torch.zeros(2), torch.zeros(3)
    x = torch.tensor([[1.0, 2.0], [10.0, 20.0]][member.rank])
    LAUNCHERS["push"](x, swapped, arena, exchange_parts([[1, 1], [1, 1]], member.rank))
    x = torch.tensor([[1.0, 2.0], [10.0]][member.rank])
    LAUNCHERS["pull"](x, whole, arena, gather_parts([2, 1], member.rank))
    return swapped.tolist(), whole.tolist()


def test_the_examples_of_the_docstrings(on_ranks):
    whole = [1.0, 2.0, 10.0]
    assert on_ranks(2, _numbers_of_the_docstrings) == [([1.0, 10.0], whole), ([2.0, 20.0], whole)]


def _every_move(member, dtypes):
    use_tiles(64)
    arena = member.arena()
    poison(member, arena, "moves")
    found = [
        mistakes_of_moves(member, arena, seed, name, dtype) for seed, (name, dtype) in every(TRITON, dtypes)
    ]
    assert not any(found), "\n".join(itertools.chain(*found))


@pytest.mark.parametrize(
    ("world_size", "dtypes"), [(2, MOVED_DTYPES), (3, MOVED_DTYPES[:3]), (4, MOVED_DTYPES[4:5])]
)
def test_every_move_of_every_dtype_is_the_reference(on_ranks, world_size, dtypes):
    on_ranks(world_size, _every_move, dtypes)


def _many_tiles(member):
    use_tiles(16)
    arena = member.arena()
    found = [
        mistakes_of_moves(member, arena, seed, name, torch.int64, unit, wanted="uneven")
        + mistakes_of_moves(member, arena, seed, name, torch.int64, unit, wanted="all_to_all")
        for seed, (name, unit) in every(TRITON, [16, 53])
    ]
    assert not any(found), "\n".join(itertools.chain(*found))


def test_parts_of_many_tiles_and_whole_ones(on_ranks):
    on_ranks(2, _many_tiles)


def _pieces(member):
    use_tiles(4096)
    arena = member.arena(staging_bytes=64 * 1024)
    unit = arena.staging.layout.half_bytes // 4 + 3
    found = [mistakes_of_moves(member, arena, seed, name, unit=unit) for seed, (name,) in every(TRITON)]
    found += [
        mistakes_of_moves(member, arena, seed, name, unit=300, piece_nbytes=256)
        for seed, (name,) in every(TRITON)
    ]
    assert not any(found), "\n".join(itertools.chain(*found))


def test_parts_longer_than_the_staging_and_than_a_piece(on_ranks):
    on_ranks(2, _pieces)


def _mixed(member):
    use_tiles(32)
    with pytest.MonkeyPatch.context() as monkeypatch:
        arena = member.arena(staging_bytes=128 * 1024)
        delay_at_random(member.rank, monkeypatch, exchange)
        same, found = random.Random(7), []
        for seed in range(12):
            name, dtype = same.choice(TRITON), same.choice(MOVED_DTYPES)
            wanted = same.choice(["even", "all_to_all", "broadcast", "scatter"])
            found += mistakes_of_moves(
                member, arena, seed, name, dtype, same.choice([1, 7, 40]), wanted=wanted
            )
    assert not found, "\n".join(found)


@pytest.mark.parametrize("world_size", [2, 3])
def test_moves_sizes_and_algorithms_alternate_with_random_delays(on_ranks, world_size):
    on_ranks(world_size, _mixed)


def _in_place(member):
    use_tiles(64)
    arena = member.arena()
    world, rank = member.world_size, member.rank
    for name in TRITON:
        x = torch.arange(world * 3) + 100 * rank
        exchange_by(name, x, x, arena, exchange_parts([[3] * world] * world, rank))
        wanted = [100 * source + 3 * rank + i for source in range(world) for i in range(3)]
        assert x.tolist() == wanted, name


def test_equal_parts_may_be_exchanged_in_place(on_ranks):
    on_ranks(3, _in_place)


def _without_staging(member):
    arena = open_arena("bare", member.exchange("bare"), "/dev/shm", 1, 20.0)
    for launcher in LAUNCHERS.values():
        with pytest.raises(CapabilityError) as caught:
            launcher(torch.zeros(3), torch.zeros(3), arena, gather_parts([3], 0))
        assert str(caught.value) == "the group has no staging memory yet; call prepare() first"
    arena.close("done")


def test_an_arena_without_staging_is_refused(on_ranks):
    on_ranks(1, _without_staging)
