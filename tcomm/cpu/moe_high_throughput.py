"""Dispatch and combine with one copy of a token for each rank, on a CPU.

The contract is that of `tcomm.kernels.moe_high_throughput`, whose sums have the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch

from tcomm.errors import DecodeError
from tcomm.memory.token_regions import DispatchRegions, ReturnRegions

__all__ = ["Given", "Head", "View", "as_words", "gather", "read_head", "return_rows", "stage", "sum_rows"]

_BLOCK_BYTES = 512 * 1024
"""Of an accumulator that stays in the L2 cache."""
_EPOCH_MASK = (1 << 32) - 1
_COUNT_MASK = (1 << 32) - 1


class View(Protocol):
    """Tensors over the half of one epoch."""

    def __call__(self, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of `shape` that begins `offset` bytes into the half of `rank`."""
        ...


@dataclasses.dataclass(frozen=True)
class Given:
    """What a rank dispatches."""

    rows: torch.Tensor
    """[T, row_nbytes / 8] int64."""
    facts: Sequence[torch.Tensor]
    """[T, words] of 32 bits, or int64 to be narrowed; side by side."""
    lists: Sequence[torch.Tensor]
    """For each rank [n] int32, `token * width + place`, ascending."""
    width: int
    """Places of a token."""

    def piece(self, destination: int, first: int, last: int) -> torch.Tensor:
        """The part of a list that is about tokens first to last."""
        entries = self.lists[destination]
        if first == 0 and last >= len(self.rows):
            return entries
        bounds = torch.tensor([first * self.width, last * self.width], dtype=torch.int32, device="cpu")
        start, end = torch.searchsorted(entries, bounds).tolist()
        return entries[start:end]


@dataclasses.dataclass(frozen=True)
class Head:
    """What a rank says of what it gives."""

    totals: list[int]
    """Rows for each rank, in all pieces."""
    rows: list[int]
    """Rows for each rank, in this piece."""
    num_tokens: int
    """Tokens of that rank."""


def as_words(x: torch.Tensor) -> torch.Tensor:
    """[rows, words] int64 over a contiguous tensor whose rows are multiples of 8 bytes."""
    return (x.clone() if x.storage_offset() * x.itemsize % 8 else x).view(torch.int64)


def stage(view: View, regions: DispatchRegions, rank: int, epoch: int, first: int, given: Given) -> None:
    """Put the tokens of one piece into this rank's half; `first` is the first of them."""
    last = min(first + regions.num_tokens, len(given.rows))
    parts = [given.piece(destination, first, last) for destination in range(regions.world_size)]
    totals, rows = map(len, given.lists), map(len, parts)
    tag = epoch << 32 if epoch < 1 << 31 else (epoch - (1 << 32)) << 32
    head = [tag | count for count in (*totals, *rows, len(given.rows))]
    view(rank, 0, (len(head),), torch.int64).copy_(torch.tensor(head, dtype=torch.int64, device="cpu"))
    if last <= first:
        return
    facts = view(rank, regions.facts_offset, (last - first, regions.num_facts), torch.int32)
    column = 0
    for each in given.facts:
        words = each if each.dtype == torch.int64 else each.view(torch.int32)
        facts[:, column : column + words.shape[1]].copy_(words[first:last])
        column += words.shape[1]
    for destination, part in enumerate(parts):
        view(rank, regions.list_offset(destination), (len(part),), torch.int32).copy_(part)
    if any(len(part) for destination, part in enumerate(parts) if destination != rank):
        staged = (last - first, given.rows.shape[1])
        view(rank, regions.rows_offset, staged, torch.int64).copy_(given.rows[first:last])


def read_head(view: View, regions: DispatchRegions, rank: int, epoch: int) -> Head:
    """What `rank` says of its piece.

    Raises:
        DecodeError: when it says so of another epoch.
    """
    words = view(rank, 0, (regions.num_head_words,), torch.int64).tolist()
    if any(word >> 32 & _EPOCH_MASK != epoch for word in words):
        raise DecodeError(f"rank {rank} gave counts {words} that are not of epoch {epoch}", peers=[rank])
    counts = [word & _COUNT_MASK for word in words]
    size = regions.world_size
    return Head(counts[:size], counts[size : 2 * size], counts[-1])


def gather(
    view: View,
    regions: DispatchRegions,
    source: int,
    rank: int,
    first: int,
    head: Head,
    given: Given,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Fetch what `source` gives to `rank` in the piece that begins with token `first`.

    Args:
        view: of the epoch.
        regions: of its half.
        source: whose tokens.
        rank: this one.
        first: of the piece.
        head: of the source.
        given: what this rank gives: its own rows come from there.
        out: rows [n, words] int64, facts [n, num_facts] int32 and places [n] int64 of just these rows.
    """
    rows, facts, row_slots = out
    count = head.rows[rank]
    if not count:
        return
    entries = view(source, regions.list_offset(rank), (count,), torch.int32)
    row_slots.copy_(entries)
    tokens = entries.div(given.width, rounding_mode="floor")
    tokens -= first
    length = min(head.num_tokens - first, regions.num_tokens)
    staged = view(source, regions.facts_offset, (length, regions.num_facts), torch.int32)
    torch.index_select(staged, 0, tokens, out=facts)
    if source == rank:
        held = given.rows[first : first + length]
    else:
        held = view(source, regions.rows_offset, (length, rows.shape[1]), torch.int64)
    torch.index_select(held, 0, tokens, out=rows)


def return_rows(
    view: View,
    regions: ReturnRegions,
    source: int,
    first: int,
    row_slots: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor | None,
) -> int:
    """Put rows into the half of the rank that they came from; returns how many.

    Args:
        view: of the epoch.
        regions: of its half.
        source: where they came from.
        first: first token of the piece.
        row_slots: [n] int64, `token * width + place`, ascending, of all rows from there.
        rows: [n, words] int64.
        weights: [n, num_weights] float32.
    """
    start, end, num_slots = (
        first * regions.width,
        (first + regions.num_tokens) * regions.width,
        len(row_slots),
    )
    if num_slots and (start or int(row_slots[-1]) >= end):
        bounds = torch.tensor([start, end], dtype=torch.int64, device="cpu")
        low, high = torch.searchsorted(row_slots, bounds).tolist()
        row_slots, rows = row_slots[low:high] - start, rows[low:high]
        weights = None if weights is None else weights[low:high]
    if not len(row_slots):
        return 0
    places = end - start
    view(source, 0, (places, rows.shape[1]), torch.int64).index_copy_(0, row_slots, rows)
    if weights is not None:
        held = view(source, regions.weights_offset, (places, weights.shape[1]), torch.float32)
        held.index_copy_(0, row_slots, weights)
    return len(row_slots)


def sum_rows(
    places: torch.Tensor, num_places: torch.Tensor, terms: Sequence[torch.Tensor], out: torch.Tensor
) -> None:
    """out[t] = sum over the places of token t in order, then over `terms`; in float32, rounded once.

    Args:
        places: [T, width, H]; those behind a token's last one are made 0.
        num_places: [T] int64.
        terms: of [T, H].
        out: [T, H].
    """
    num_tokens, width, hidden = places.shape
    steps = torch.arange(width, device="cpu")
    unused = (steps >= num_places[:, None]).view(-1).nonzero().view(-1)
    if len(unused):
        places.view(num_tokens * width, hidden).index_fill_(0, unused, 0)
    size = max(1, _BLOCK_BYTES // (4 * hidden))
    total = torch.empty(min(size, num_tokens), hidden, dtype=torch.float32, device="cpu")
    for start in range(0, num_tokens, size):
        block = slice(start, start + size)
        sums = total[: min(size, num_tokens - start)]
        sums.copy_(places[block, 0])
        for place in range(1, width):
            sums.add_(places[block, place])
        for term in terms:
            sums.add_(term[block])
        out[block].copy_(sums)
