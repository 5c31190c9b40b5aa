import pytest
import torch
import triton
import triton.language as tl

from tcomm.kernels.moe_row_tables import codes_of, copy_rows, row_constants, row_pointers, table_of


@triton.jit
def _reverse_kernel(
    x_ptr, out_ptr, table_ptr, num_rows, rank,
    VIRTUAL: tl.constexpr, ROW_WORDS: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """out[i] = x[table[i]] for i < num_rows."""
    rows = tl.arange(0, ROWS)
    table_ptr = table_of(table_ptr, num_rows, rank, VIRTUAL)
    named = tl.load(table_ptr + rows, mask=rows < num_rows, other=0)
    dst = row_pointers(out_ptr.to(tl.int64), rows * ROW_WORDS * 4, tl.int32, UNIT)
    copy_rows(x_ptr + named * ROW_WORDS, dst, rows < num_rows, ROW_WORDS, COLS)


@pytest.mark.parametrize("words", [1, 5, 8])
def test_named_rows_are_copied_and_nothing_else(words):
    x = torch.arange(6 * words, dtype=torch.int32).view(6, words)
    table = torch.tensor([[9, 9, 9], [4, 0, 2]])
    out = torch.full((4, words), -1, dtype=torch.int32)
    constants = row_constants(words, 4, 3) | {"COLS": 4, "ROWS": 4}
    _reverse_kernel[(1,)](x, out, table, 3, 1, VIRTUAL=True, **constants)
    assert out.tolist() == [*x[[4, 0, 2]].tolist(), [-1] * words]
    again = torch.full_like(out, -1)
    _reverse_kernel[(1,)](x, again, table[1], 3, 1, VIRTUAL=False, **constants)
    assert again.tolist() == out.tolist()


def test_constants_follow_from_the_row():
    assert row_constants(6, 8, 5) == {"ROW_WORDS": 6, "COLS": 8, "ROWS": 8, "UNIT": 16}
    assert row_constants(7, 8, 1)["UNIT"] == 8
    assert row_constants(7, 1, 0) == {"ROW_WORDS": 7, "COLS": 8, "ROWS": 1, "UNIT": 1}


def test_codes_are_rank_and_place_in_one():
    ranks, slots = torch.tensor([[1, -1], [0, 2]]), torch.tensor([[4, -1], [0, 1]])
    codes = codes_of((ranks, slots), 5)
    assert codes.tolist() == [[9, -1], [0, 11]]
    assert codes.dtype == torch.int32
