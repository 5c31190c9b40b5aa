"""What every collective means, as a slow program: all ranks' inputs in, all ranks' outputs out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tcomm.algorithms import acc_dtype, combine_of

__all__ = ["all_reduce"]


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
        acc = acc * torch.tensor(1.0 / len(inputs), dtype=acc.dtype)
    return [acc.to(inputs[0].dtype) for _ in inputs]
