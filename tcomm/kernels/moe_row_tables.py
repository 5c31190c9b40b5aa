"""Moving whole rows to places that tables name: what the exchanges of tokens have in common."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from tcomm.interpret import is_interpreted
from tcomm.kernels.launch import tile_numel

__all__ = ["codes_of", "copy_rows", "row_constants", "row_pointers", "table_of"]

_VECTOR_BYTES = 16
_MOST_ROWS = 64


@triton.jit
def table_of(ptr, stride, rank, VIRTUAL: tl.constexpr):
    """Where the table of `rank` begins; those of virtual ranks follow one another, wherever that is."""
    if VIRTUAL:
        return ptr + rank * stride
    else:
        return ptr


@triton.jit
def row_pointers(bases, offsets, dtype: tl.constexpr, UNIT: tl.constexpr):
    """Pointers to rows `offsets` bytes from `bases` (int64 each), which are multiples of UNIT bytes."""
    return tl.multiple_of((bases + offsets).to(tl.pointer_type(dtype)), UNIT)


@triton.jit
def copy_rows(src, dst, mask, ROW_WORDS: tl.constexpr, COLS: tl.constexpr):
    """Copy ROW_WORDS words from each pointer in src to that in dst, where `mask` says so."""
    for start in tl.static_range(0, ROW_WORDS, COLS):
        cols = start + tl.arange(0, COLS)
        inside = mask[:, None] & (cols < ROW_WORDS)[None, :]
        words = tl.load(src[:, None] + cols[None, :], mask=inside)
        tl.store(dst[:, None] + cols[None, :], words, mask=inside)


def row_constants(row_words: int, itemsize: int, num_rows: int) -> dict[str, Any]:
    """Compile-time arguments for rows of so many words.

    Args:
        row_words: words of a row, at least one.
        itemsize: bytes of a word.
        num_rows: rows that a launch may have to move.
    """
    tile = tile_numel(itemsize)
    cols = min(triton.next_power_of_2(row_words), tile)
    most = triton.next_power_of_2(max(1, num_rows)) if is_interpreted() else _MOST_ROWS
    unit = _VECTOR_BYTES if row_words * itemsize % _VECTOR_BYTES == 0 else itemsize
    return {"ROW_WORDS": row_words, "COLS": cols, "ROWS": max(1, min(tile // cols, most)), "UNIT": unit}


def codes_of(tables: Sequence[torch.Tensor], runtime_max: int) -> torch.Tensor:
    """[..., T, k] int32: `rank * runtime_max + place` of each copy, -1 where there is none."""
    ranks, slots = tables[0], tables[1]
    return torch.where(ranks >= 0, ranks * runtime_max + slots, -1).to(torch.int32).contiguous()
