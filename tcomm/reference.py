"""What every collective means, as a slow program: all ranks' inputs in, all ranks' outputs out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tcomm.algorithms import acc_dtype, combine_of

__all__ = [
    "all_gather",
    "all_reduce",
    "all_to_all",
    "broadcast",
    "gather",
    "reduce",
    "reduce_scatter",
    "scatter",
]


def all_reduce(inputs: Sequence[torch.Tensor], op: str = "sum") -> list[torch.Tensor]:
    """Every rank gets the reduction of all inputs, in rank order, rounded once.

    Args:
        inputs: one tensor per rank, of one shape and dtype.
        op: `sum`, `avg`, `max` or `min`.

    Returns:
        One tensor per rank, each the same bits.
    """
    combine = combine_of(op)
    acc = inputs[0].to(acc_dtype(inputs[0].dtype))
    for tensor in inputs[1:]:
        acc = combine(acc, tensor.to(acc.dtype))
    if op == "avg":
        acc = acc * torch.tensor(1.0 / len(inputs), dtype=acc.dtype, device=acc.device)
    return [acc.to(inputs[0].dtype) for _ in inputs]


def reduce(inputs: Sequence[torch.Tensor], root: int, op: str = "sum") -> list[torch.Tensor | None]:
    """The root gets what `all_reduce` gives, the others None."""
    return [total if rank == root else None for rank, total in enumerate(all_reduce(inputs, op))]


def reduce_scatter(
    inputs: Sequence[torch.Tensor], op: str = "sum", dim: int = 0, sizes: Sequence[int] | None = None
) -> list[torch.Tensor]:
    """Rank `r` gets the r-th part of what `all_reduce` gives, along `dim`.

    Args:
        inputs: one tensor per rank, of one shape and dtype.
        op: as for `all_reduce`.
        dim: along which it is taken apart.
        sizes: length of each rank's part; equal parts where None.
    """
    total = all_reduce(inputs, op)[0]
    return scatter([total] * len(inputs), 0, dim, sizes)


def all_gather(inputs: Sequence[torch.Tensor], dim: int = 0) -> list[torch.Tensor]:
    """Every rank gets all inputs one after another along `dim`; they may differ in length there."""
    return [torch.cat(list(inputs), dim) for _ in inputs]


def gather(inputs: Sequence[torch.Tensor], root: int, dim: int = 0) -> list[torch.Tensor | None]:
    """The root gets what `all_gather` gives, the others None."""
    return [whole if rank == root else None for rank, whole in enumerate(all_gather(inputs, dim))]


def broadcast(inputs: Sequence[torch.Tensor], root: int) -> list[torch.Tensor]:
    """Every rank gets the root's input."""
    return [inputs[root].clone() for _ in inputs]


def scatter(
    inputs: Sequence[torch.Tensor], root: int, dim: int = 0, sizes: Sequence[int] | None = None
) -> list[torch.Tensor]:
    """Rank `r` gets the r-th part of the root's input along `dim`; equal parts where `sizes` is None."""
    length = inputs[root].shape[dim]
    lengths = list(sizes) if sizes is not None else [length // len(inputs)] * len(inputs)
    return [part.clone() for part in inputs[root].split(lengths, dim)]


def all_to_all(
    inputs: Sequence[torch.Tensor], splits: Sequence[Sequence[int]] | None = None
) -> list[torch.Tensor]:
    """Rank `d` gets the d-th part of every input, in rank order; rank `s` gives it `splits[s][d]` rows."""
    world = len(inputs)
    if splits is None:
        splits = [[x.shape[0] // world] * world for x in inputs]
    parts = [x.split(list(row)) for x, row in zip(inputs, splits, strict=True)]
    return [torch.cat([row[d] for row in parts]) for d in range(world)]
