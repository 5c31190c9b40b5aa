import pytest
import torch

from tcomm.errors import CapabilityError
from tcomm.kernels import launch as launch_module
from tcomm.kernels.launch import common_constants, grid_of, launches, narrow_tile_of, tile_numel
from tcomm.memory.control import MAX_BLOCKS, Word
from tcomm.memory.layout import cut
from tests.kernels.test_all_reduce import capacity, use_tiles
from tests.test_algorithms import TRITON, mistake, reduce_by


@pytest.mark.parametrize(("num_tiles", "num_blocks"), [(0, 1), (1, 1), (2, 2), (3, 2), (10**9, 2)])
def test_a_grid_is_bounded_and_never_empty(num_tiles, num_blocks):
    assert grid_of(num_tiles) == num_blocks


def test_a_grid_never_passes_the_arrival_words(monkeypatch):
    monkeypatch.setattr(launch_module, "_INTERPRETED_BLOCKS", 1000)
    assert grid_of(10**6) == MAX_BLOCKS


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_tiles_are_powers_of_two(itemsize, monkeypatch):
    assert tile_numel(itemsize).bit_count() == 1
    monkeypatch.setattr(launch_module, "is_interpreted", lambda: False)
    compiled = tile_numel.__wrapped__(itemsize)
    assert compiled.bit_count() == 1
    assert compiled * itemsize == launch_module._COMPILED_TILE_BYTES


def _constants(member):
    arena = member.arena(staging_bytes=256 * 1024)
    return common_constants(arena, arena.staging)


def test_kernels_are_told_the_world_and_the_lanes(on_ranks):
    for constants in on_ranks(3, _constants):
        assert constants == {
            "WORLD": 3,
            "LANES": 4,
            "LANE_HALF_BYTES": 16128,
            "ATOMIC_POLL": False,
            "VIRTUAL": False,
        }


def _counts(member):
    use_tiles(512, 4)
    arena = member.arena(staging_bytes=64 * 1024)
    counted = []
    for name in TRITON:
        numel = 2 * capacity(name, arena.staging.layout) // 4 + 3
        pieces = len(cut(numel, 4, capacity(name, arena.staging.layout)))
        before, epoch = launches.total(), arena.channel.words[Word.EPOCH]
        reduce_by(name, torch.ones(numel), arena)
        assert launches[f"_{name.partition(':')[2]}_all_reduce_kernel"] == pieces
        counted.append((launches.total() - before, arena.channel.words[Word.EPOCH] - epoch, pieces))
    return counted


def test_every_piece_is_one_counted_launch_and_one_epoch(on_ranks):
    for counted in on_ranks(2, _counts):
        assert all(launched == epochs == pieces > 2 for launched, epochs, pieces in counted)


def _compiled_kernels_are_refused(member):
    arena = member.arena()
    use_tiles(8192)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(launch_module, "is_interpreted", lambda: False)
        with pytest.raises(CapabilityError) as caught:
            reduce_by("triton:two_shot", torch.ones(3), arena)
    assert str(caught.value) == (
        "kernels are compiled in this process and the tensors are in host memory; set TRITON_INTERPRET=1 "
        "before the first import of triton to interpret them"
    )
    return mistake(member, arena, 1, "triton:two_shot")


def test_host_memory_is_refused_to_compiled_kernels_before_anything_is_sent(on_ranks):
    assert on_ranks(2, _compiled_kernels_are_refused) == ["", ""]


def test_short_messages_go_in_short_tiles_where_they_are_interpreted(monkeypatch):
    sizes = (0, 1, 5, 64, 65, 1 << 40)
    tiles = [1, 1, 8, 64, 128, tile_numel(4)]
    assert [narrow_tile_of(4, numel) for numel in sizes] == tiles
    assert [launch_module.tile_of(4, numel, 2) for numel in sizes] == tiles
    monkeypatch.setattr(launch_module, "is_interpreted", lambda: False)
    assert {narrow_tile_of(4, numel) for numel in sizes} == {tile_numel(4)}


@pytest.mark.parametrize("sources", range(1, 17))
def test_long_messages_go_in_wide_tiles_that_are_powers_of_two(sources, monkeypatch):
    assert launch_module.tile_of(4, 1 << 40, sources) == tile_numel(4)
    monkeypatch.setattr(launch_module, "is_interpreted", lambda: False)
    monkeypatch.setattr(launch_module, "tile_numel", lambda itemsize: 4096 // itemsize)
    always = launch_module.ALWAYS_WIDE_TILES * 1024
    wide = launch_module.tile_of(4, always, sources)
    assert wide.bit_count() == 1
    assert wide * sources <= 16 * 1024 or wide == 1024
    assert wide == 1024 * {1: 4, 2: 4, 3: 4, 4: 4, 5: 2, 6: 2, 7: 2, 8: 2}.get(sources, 1)
    assert launch_module.tile_of(4, 1024, sources) == 1024


def test_a_grid_keeps_to_what_is_resident(monkeypatch):
    monkeypatch.setattr(launch_module, "is_interpreted", lambda: False)
    assert [grid_of(1000), grid_of(1000, 5), grid_of(1000, 99), grid_of(3, 5)] == [16, 5, MAX_BLOCKS, 3]
