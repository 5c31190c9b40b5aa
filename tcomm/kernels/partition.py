"""The table of parts: made on the host, read by the kernels that move ranges."""

import functools

import torch
import triton
import triton.language as tl

from tcomm.parts import Parts

__all__ = ["as_words", "given_part", "part_from", "part_table", "part_to"]

_VECTOR_BYTES = 16
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def as_words(x: torch.Tensor) -> torch.Tensor:
    """Contiguous x, flat, as integers: what only moves needs no type."""
    # A single element may have any stride and be contiguous, and could not be seen as smaller words.
    return x.as_strided((x.numel(),), (1,)).view(_WORDS[x.itemsize])


@functools.lru_cache(1024)
def part_table(parts: Parts, itemsize: int, device: torch.device) -> tuple[torch.Tensor, int]:
    """What a kernel needs to know of `parts`, which are in bytes.

    Returns:
        [4, W] int64 (first word and number of words of what is sent to each rank, then of what is received
        from each), and a number of words that divides every first one: a whole vector, or 1.
    """
    ranges = (*parts.sends, *parts.receives)
    aligned = all(first % _VECTOR_BYTES == 0 for first, nbytes in ranges if nbytes)
    rows = [
        [part[field] // itemsize for part in side]
        for side in (parts.sends, parts.receives)
        for field in (0, 1)
    ]
    return torch.tensor(rows, dtype=torch.int64, device=device), _VECTOR_BYTES // itemsize if aligned else 1


@triton.jit
def part_to(parts_ptr, peer, WORLD: tl.constexpr, UNIT: tl.constexpr):
    """First word and number of words of the part of x for `peer`."""
    return tl.multiple_of(tl.load(parts_ptr + peer), UNIT), tl.load(parts_ptr + WORLD + peer)


@triton.jit
def part_from(parts_ptr, peer, WORLD: tl.constexpr, UNIT: tl.constexpr):
    """First word and number of words of the part of out from `peer`."""
    first = tl.multiple_of(tl.load(parts_ptr + 2 * WORLD + peer), UNIT)
    return first, tl.load(parts_ptr + 3 * WORLD + peer)


@triton.jit
def given_part(parts_ptr, WORLD: tl.constexpr, UNIT: tl.constexpr):
    """The part of x that all get who get any."""
    first, numel = part_to(parts_ptr, 0, WORLD, UNIT)
    for peer in tl.static_range(1, WORLD):
        numel = tl.maximum(numel, tl.load(parts_ptr + WORLD + peer))
    return first, numel
