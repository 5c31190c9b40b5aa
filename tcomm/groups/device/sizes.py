"""Checks of dimensions and lengths with the texts that users of vllm.distributed know."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tcomm.errors import ConfigError, UsageError
from tcomm.groups.arguments import check_dim, check_sizes, check_tensor

__all__ = ["dim_of", "sizes_of"]


def dim_of(verb: str, x: torch.Tensor, dim: int) -> int:
    """`dim` of x counted from the front.

    Raises:
        UsageError: when x has no such dimension.
        ConfigError: when x is no dense tensor.
    """
    check_tensor(verb, x, False)
    try:
        return check_dim(verb, x.shape, dim)
    except ConfigError as error:
        raise UsageError(f"Invalid dim ({dim}) for input tensor with shape {x.size()}: {error}") from None


def sizes_of(verb: str, sizes: Sequence[int] | None, world_size: int) -> tuple[int, ...] | None:
    """The length on each rank; None where none were given.

    Raises:
        UsageError: when there is not one for each rank, or one is no length.
    """
    if sizes is None:
        return None
    try:
        return check_sizes(f"sizes of {verb}", sizes, world_size)
    except ConfigError as error:
        raise UsageError(str(error)) from None
