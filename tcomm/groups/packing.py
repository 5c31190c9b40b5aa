"""Many tensors in one message: the chunks of all of them for a rank, one after another."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterable, Sequence

import torch

from tcomm.errors import ConfigError
from tcomm.groups.arguments import check_out, dtype_name

__all__ = ["Packing", "Split", "describe_kinds", "result_tensors"]

_ALIGNMENT = 16
"""Bytes at which a chunk begins, where element types are mixed."""
_DESCRIBED = 200
"""Characters that are told of many kinds: a description is read whole or not at all, and has little room."""


@dataclasses.dataclass(frozen=True)
class Split:
    """How one tensor falls into chunks."""

    shape: tuple[int, ...]
    """Of the whole."""
    dtype: torch.dtype
    """Element type."""
    dim: int
    """Along which it is cut."""
    sizes: tuple[int, ...]
    """Length of each chunk along `dim`."""

    @classmethod
    def whole(cls, x: torch.Tensor) -> Split:
        """One chunk, of any shape."""
        return cls((x.numel(),), x.dtype, 0, (x.numel(),))

    def numel(self, chunk: int) -> int:
        """Elements of a chunk."""
        rest = math.prod(self.shape[: self.dim]) * math.prod(self.shape[self.dim + 1 :])
        return rest * self.sizes[chunk]

    def chunks(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views of x, which is of as many elements as the shape."""
        return tuple(x.view(self.shape).split(list(self.sizes), self.dim))


class Packing:
    """Where each tensor's chunks lie in one flat tensor: chunk 0 of all tensors, then chunk 1 of all.

    Args:
        splits: of the tensors; all into the same number of chunks.
        as_bytes: mix element types; the flat tensor is uint8. Otherwise they share one, and so does it.
    """

    def __init__(self, splits: Sequence[Split], as_bytes: bool) -> None:
        self._splits = tuple(splits)
        self._as_bytes = as_bytes
        self.dtype = torch.uint8 if as_bytes else splits[0].dtype
        """Of the flat tensor."""
        self.sizes = tuple(
            sum(self._room(split, chunk) for split in splits) for chunk in range(len(splits[0].sizes))
        )
        """Elements of the flat tensor for each chunk."""

    @property
    def contents(self) -> str:
        """The tensors in few words, and where they are cut: what the ranks must have in common."""
        told = describe_kinds((split.dtype, split.shape) for split in self._splits)
        dims = [split.dim for split in self._splits]
        return f"{told} along dims {dims}" if any(dims) else told

    def _room(self, split: Split, chunk: int) -> int:
        if not self._as_bytes:
            return split.numel(chunk)
        return -(-split.numel(chunk) * split.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT

    def pack(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """A flat tensor with all chunks in it."""
        flat = torch.empty(sum(self.sizes), dtype=self.dtype, device=tensors[0].device)
        for place, chunk in self._pairs(flat, [x.contiguous() for x in tensors]):
            place.copy_(chunk)
        return flat

    def unpack(self, flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
        """Copy all chunks out of a flat tensor."""
        dense = [x if x.is_contiguous() else x.new_empty(x.shape) for x in tensors]
        for place, chunk in self._pairs(flat, dense):
            chunk.copy_(place)
        for x, copy in zip(tensors, dense, strict=True):
            if copy is not x:
                x.copy_(copy)

    def _pairs(
        self, flat: torch.Tensor, tensors: Sequence[torch.Tensor]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        chunks = [split.chunks(x) for split, x in zip(self._splits, tensors, strict=True)]
        pairs, start = [], 0
        for index in range(len(self.sizes)):
            for split, parts in zip(self._splits, chunks, strict=True):
                place = flat[start : start + self._room(split, index)]
                start += place.numel()
                if self._as_bytes:
                    place = place[: split.numel(index) * split.dtype.itemsize].view(split.dtype)
                pairs.append((place.view(parts[index].shape), parts[index]))
        return pairs


def describe_kinds(kinds: Iterable[tuple[torch.dtype, Sequence[int]]]) -> str:
    """Types and shapes of tensors in few words, which differ where the tensors do."""
    told = "; ".join(f"{dtype_name(dtype)} {list(shape)}" for dtype, shape in kinds)
    return (
        told if len(told) <= _DESCRIBED else f"{told[:_DESCRIBED]}... (crc {zlib.crc32(told.encode()):08x})"
    )


def result_tensors(
    verb: str,
    xs: Sequence[torch.Tensor],
    outs: Sequence[torch.Tensor] | None,
    shapes: Sequence[Sequence[int]],
) -> list[torch.Tensor]:
    """Where the results of several tensors go: as given and checked, or new.

    Raises:
        ConfigError: when `outs` does not fit.
    """
    if outs is None:
        return [
            torch.empty(tuple(shape), dtype=x.dtype, device=x.device)
            for x, shape in zip(xs, shapes, strict=True)
        ]
    if len(outs) != len(xs):
        raise ConfigError(f"out= of {verb} has {len(outs)} tensors; needed one for each of {len(xs)}")
    for x, out, shape in zip(xs, outs, shapes, strict=True):
        check_out(verb, x, out, shape, False)
    return list(outs)
