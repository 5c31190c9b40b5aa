"""The table of parts: made on the host, read by the kernels that move ranges."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from tcomm.errors import CapabilityError
from tcomm.memory.base import KernelArena
from tcomm.parts import Parts

__all__ = [
    "as_flat_words",
    "as_small_words",
    "as_words",
    "each_rank",
    "equal_part",
    "given_part",
    "part_from",
    "part_table",
    "part_to",
]

_VECTOR_BYTES = 16
_MAX_TABLES = 1024
_Key = tuple[tuple[Parts, ...], int, torch.device]
_tables: dict[_Key, tuple[torch.Tensor, int]] = {}
"""The tables used last, in order of use: they are the same in every call of a kind."""
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def as_words(x: torch.Tensor) -> torch.Tensor:
    """x, whose last dimension has stride 1, as integers: what only moves needs no type."""
    return x.view(_WORDS[x.itemsize])


def as_flat_words(x: torch.Tensor) -> torch.Tensor:
    """Contiguous x as `as_words`, in one dimension."""
    # A single element may have any stride and be contiguous, and could not be seen as smaller words.
    return as_words(x.as_strided((x.numel(),), (1,)))


def as_small_words(x: torch.Tensor) -> torch.Tensor:
    """As `as_words`, of 32 bits at most: what is longer becomes several."""
    return as_words(x) if x.itemsize < 4 else x.view(torch.int32)


def equal_part(parts: Parts) -> int:
    """Elements that every rank gives to all.

    Raises:
        CapabilityError: when it is not one range of the same length for each.
    """
    numel = parts.longest
    equal = tuple((source * numel, numel) for source in range(parts.world_size))
    if not parts.shared or parts.receives != equal or set(parts.sends) != {(0, numel)}:
        raise CapabilityError(
            "a multimem all-gather takes one range of equal length from each rank, for all ranks; "
            f"this rank gives {list(parts.sends)} and gets {list(parts.receives)} (first, length)"
        )
    return numel


def each_rank(parts: Parts | Sequence[Parts]) -> tuple[Parts, ...]:
    """The table of this rank, or those of all virtual ranks."""
    return (parts,) if isinstance(parts, Parts) else tuple(parts)


def part_table(parts: tuple[Parts, ...], itemsize: int, arena: KernelArena) -> tuple[torch.Tensor, int]:
    """What a kernel needs to know of `parts` (of each rank that a launch works for), which are in bytes.

    Raises:
        CapabilityError: while a graph is captured, when the table has yet to be made.

    Returns:
        [ranks, 4, W] int64 (first word and number of words of what is sent to each rank, then of what is
        received from each), and a number of words that divides every first one: a whole vector, or 1.
    """
    key = (parts, itemsize, arena.device)
    found = _tables.pop(key, None)
    if found is None:
        arena.runtime.refuse_in_capture("a table of parts has to be made")
        found = _make_table(parts, itemsize, arena.device)
    _tables[key] = found
    if len(_tables) > _MAX_TABLES:
        del _tables[next(iter(_tables))]
    return found


def _make_table(parts: tuple[Parts, ...], itemsize: int, device: torch.device) -> tuple[torch.Tensor, int]:
    ranges = [part for one in parts for part in (*one.sends, *one.receives)]
    aligned = all(first % _VECTOR_BYTES == 0 for first, nbytes in ranges if nbytes)
    rows = [
        [[part[field] // itemsize for part in side] for side in (one.sends, one.receives) for field in (0, 1)]
        for one in parts
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
