import types

from tcomm.kernels.moe_rows import blocks_for, lanes_for, tile_for


def test_sizes_of_what_is_handled_at_a_time():
    assert [lanes_for(numel) for numel in (0, 1, 3, 8, 9)] == [1, 1, 4, 8, 16]
    assert tile_for(48, 512) == 64  # interpreted: all of it
    arena = types.SimpleNamespace(max_blocks=32)
    assert [blocks_for(rows, arena) for rows in (-3, 0, 1, 2, 900)] == [1, 1, 1, 2, 2]
