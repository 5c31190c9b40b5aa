"""Views of tensors."""

from __future__ import annotations

import torch

from tcomm.errors import ConfigError
from tcomm.groups.helpers.partition import divide

__all__ = ["is_weak_contiguous", "split_tensor_along_last_dim"]


def split_tensor_along_last_dim(
    tensor: torch.Tensor, num_partitions: int, contiguous_split_chunks: bool = False
) -> tuple[torch.Tensor, ...]:
    """Equal parts of a tensor along its last dimension.

    Args:
        tensor: of any dtype, with one dimension or more.
        num_partitions: how many.
        contiguous_split_chunks: copy each part to memory of its own; otherwise they are views.

    Raises:
        UsageError: when the last dimension is no multiple of num_partitions.
        ConfigError: when the tensor has no dimension, or the number is negative.
        ZeroDivisionError: when the number is 0.
    """
    if tensor.dim() == 0 or num_partitions < 0:
        raise ConfigError(
            f"a tensor of shape {list(tensor.shape)} cannot be split into {num_partitions} parts along its "
            "last dimension; give one with a dimension, and a positive number"
        )
    divide(tensor.shape[-1], num_partitions)
    # torch.split would give one part of a dimension of length 0.
    parts = torch.tensor_split(tensor, num_partitions, dim=-1)
    return tuple(part.contiguous() for part in parts) if contiguous_split_chunks else tuple(parts)


def is_weak_contiguous(t: torch.Tensor) -> bool:
    """Whether a tensor is all of its memory from its first element on, in any order of its dimensions."""
    if t.is_contiguous():
        return True
    bytes_left = t.untyped_storage().nbytes() - t.storage_offset() * t.itemsize
    return bytes_left == t.numel() * t.itemsize
