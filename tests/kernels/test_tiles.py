import itertools
import os
import random

import pytest
import torch
import triton.language as tl

from tcomm.kernels import tiles
from tcomm.memory.base import Staging, SymmetricBuffer
from tcomm.memory.layout import StagingLayout
from tests.kernels.test_all_reduce import use_tiles
from tests.test_algorithms import TRITON, mistake, reduce_by

GIB = 1 << 30


def _around_tile_bounds(member):
    use_tiles(16, 3)
    arena, found = member.arena(), []
    for seed, (name, numel) in enumerate(itertools.product(TRITON, [15, 16, 17, 32, 33, 129])):
        found.append(mistake(member, arena, seed, name, "sum", torch.float16, (numel,)))
    assert not any(found), "\n".join(filter(None, found))


def test_messages_that_end_at_and_next_to_a_tile(on_ranks):
    on_ranks(2, _around_tile_bounds)


def _tails_as_compiled(member):
    """Compiled kernels take what follows the last full tile in steps of an eighth of one."""
    use_tiles(64, 3)
    tiles.INTERPRETED = tl.constexpr(False)
    arena, found = member.arena(), []
    names = [name for name in TRITON if "_ll" not in name]
    sizes = [0, 7, 63, 64 + 7, 64 + 8, 64 + 9, 64 + 20, 5 * 64 + 33]
    for seed, (name, numel) in enumerate(itertools.product(names, sizes)):
        found.append(mistake(member, arena, seed, name, "sum", torch.bfloat16, (numel,)))
    assert not any(found), "\n".join(filter(None, found))


def test_tails_in_small_steps_as_in_compiled_kernels(on_ranks):
    on_ranks(2, _tails_as_compiled)


def _alternating_grids(member, num_calls):
    use_tiles(16, 8)
    arena, found, same = member.arena(staging_bytes=64 * 1024), [], random.Random(3)
    for seed in range(num_calls):
        name, numel = same.choice(TRITON), same.choice([3, 20, 60, 130, 290])
        dtype = same.choice([torch.float32, torch.bfloat16])
        in_place = seed % 3 == 0
        found.append(mistake(member, arena, seed, name, "avg", dtype, (numel,), in_place=in_place))
    assert not any(found), "\n".join(filter(None, found))


@pytest.mark.parametrize(("world_size", "num_calls"), [(2, 16), (3, 10)])
def test_one_to_eight_programs_alternate(on_ranks, world_size, num_calls):
    on_ranks(world_size, _alternating_grids, num_calls)


def sparse_bytes(directory, name, nbytes):
    """[nbytes] uint8 over a file of that length with no blocks, shared by all who name it."""
    path = f"{directory}/{name}"
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage.from_file(path, True, nbytes))


def sparse_staging(member, arena, directory, nbytes):
    """Replace the arena's staging by one of `nbytes` a rank, of which few pages exist. **Collective.**"""
    buffers = [sparse_bytes(directory, f"rank{rank}", nbytes) for rank in range(member.world_size)]
    arena.staging = Staging(SymmetricBuffer(member.rank, buffers), StagingLayout(nbytes, member.world_size))
    # Epoch 1 renews the lanes, which would touch all of their pages.
    arena.set_epoch(8)
    member.meet("sparse")


def allocated(directory):
    """Bytes that the files of a directory really take."""
    return sum(entry.stat().st_blocks * 512 for entry in os.scandir(directory))


def _past_two_gib(member, directory, nbytes):
    use_tiles(256)
    arena = member.arena()
    sparse_staging(member, arena, directory, nbytes)
    layout = arena.staging.layout
    assert layout.half(1) > 1 << 31
    found = [mistake(member, arena, seed, TRITON[seed // 2], shape=(500,)) for seed in range(2 * len(TRITON))]
    return [wrong for wrong in found if wrong], layout.slot_bytes


def test_halves_that_begin_past_two_gib(on_ranks, tmp_path):
    for wrong, _ in on_ranks(2, _past_two_gib, str(tmp_path), 6 * GIB):
        assert wrong == []
    assert allocated(tmp_path) < 1 << 20


def test_slots_that_begin_past_two_gib_of_a_half(on_ranks, tmp_path):
    for wrong, slot_bytes in on_ranks(3, _past_two_gib, str(tmp_path), 9 * GIB):
        assert 2 * slot_bytes > 1 << 31 > slot_bytes
        assert wrong == []
    assert allocated(tmp_path) < 2 << 20


def test_lanes_end_before_two_gib():
    for world_size in (2, 8, 512):
        assert StagingLayout(72 * GIB, world_size).half_offset <= 2 * world_size << 20 < 1 << 31


def _far_in_a_long_tensor(member, directory):
    use_tiles(256)
    arena = member.arena()
    whole = sparse_bytes(directory, f"input{member.rank}", 2 * GIB + 8192).view(torch.float32)
    for name in TRITON:
        x = whole[-1001:-1]
        x.fill_(member.rank + 1.0)
        assert x.data_ptr() - whole.data_ptr() > 1 << 31
        assert reduce_by(name, x, arena).eq(3.0).all(), name
        assert reduce_by(name, x, arena, out=x).eq(3.0).all(), name
        assert whole[-1] == 0


def test_inputs_that_begin_past_two_gib_of_their_memory(on_ranks, tmp_path):
    on_ranks(2, _far_in_a_long_tensor, str(tmp_path))
    assert allocated(tmp_path) < 1 << 20
