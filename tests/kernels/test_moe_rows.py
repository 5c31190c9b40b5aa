import types

import torch
import triton
import triton.language as tl

from tcomm.kernels.moe_rows import blocks_for, copy_facts, copy_row, half_of, lanes_for, tile_for


@triton.jit
def _copying_kernel(
    rows_ptr, facts_ptr, row_out_ptr, facts_out_ptr, halves_ptr, epoch,
    WORDS: tl.constexpr, BLOCK: tl.constexpr, FACTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    copy_row(rows_ptr, row_out_ptr, WORDS, BLOCK)
    copy_facts(facts_ptr, facts_out_ptr, FACTS, LANES)
    tl.store(halves_ptr, half_of(epoch.to(tl.int64) << 32, 100, 1000))
    tl.store(halves_ptr + 1, half_of((epoch.to(tl.int64) + 1) << 32, 100, 1000))


def test_rows_and_facts_are_copied_and_nothing_behind_them():
    rows, row = torch.arange(7) + (1 << 40), torch.zeros(8, dtype=torch.int64)
    facts, narrow = torch.arange(5) - 2, torch.full((6,), 9, dtype=torch.int32)
    halves = torch.zeros(2, dtype=torch.int64)
    _copying_kernel[(1,)](rows, facts, row, narrow, halves, 6, WORDS=7, BLOCK=4, FACTS=5, LANES=2)
    assert row.tolist() == [*rows.tolist(), 0]
    assert narrow.tolist() == [-2, -1, 0, 1, 2, 9]
    assert halves.tolist() == [200, 1200]


def test_sizes_of_what_is_handled_at_a_time():
    assert [lanes_for(numel) for numel in (0, 1, 3, 8, 9)] == [1, 1, 4, 8, 16]
    assert tile_for(48, 512) == 64  # interpreted: all of it
    arena = types.SimpleNamespace(max_blocks=32)
    assert [blocks_for(rows, arena) for rows in (-3, 0, 1, 2, 900)] == [1, 1, 1, 2, 2]
