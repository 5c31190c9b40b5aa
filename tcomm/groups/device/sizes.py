"""Checks of dimensions, lengths, ranks and shapes, with the texts that users of vllm.distributed know."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

from tcomm.errors import ConfigError, UsageError
from tcomm.groups.arguments import check_dim, check_rank, check_sizes, check_tensor

__all__ = ["check_gatherv", "dim_of", "rank_of", "scatter_of", "shape_of", "sizes_of"]


def dim_of(verb: str, x: torch.Tensor, dim: int) -> int:
    """`dim` of x counted from the front.

    Raises:
        UsageError: when x has no such dimension.
        ConfigError: when x is no dense tensor.
    """
    check_tensor(verb, x, False)
    try:
        if isinstance(dim, bool):
            raise ConfigError(f"dim={dim} of {verb} is no integer")
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
        lengths = check_sizes(f"sizes of {verb}", sizes, world_size)
    except ConfigError as error:
        raise UsageError(str(error)) from None
    if any(isinstance(size, bool) for size in sizes):
        raise UsageError(f"sizes of {verb}={sizes!r} has entries that are no integers")
    return lengths


def rank_of(verb: str, what: str, rank: int, world_size: int, group: str) -> int:
    """`rank`, when the group has it.

    Raises:
        UsageError: "Invalid src rank (...)", or what else the rank is of.
    """
    try:
        if isinstance(rank, bool):
            raise ConfigError(f"{what}={rank} of {verb} is no rank")
        return check_rank(verb, what, rank, world_size)
    except ConfigError:
        raise UsageError(
            f"Invalid {what} rank ({rank}) of {verb}: group {group!r} has ranks 0 to {world_size - 1}"
        ) from None


def shape_of(verb: str, size: Sequence[int], dtype: torch.dtype) -> torch.Size:
    """The shape of a tensor that is received.

    Raises:
        ConfigError: when there is no such tensor.
    """
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype={dtype!r} of {verb} is no torch.dtype; give that of the tensor sent")
    try:
        shape = torch.Size([operator.index(length) for length in size])
    except TypeError:
        shape = torch.Size([-1])
    if any(length < 0 for length in shape):
        raise ConfigError(f"size={size!r} of {verb} is no shape; give that of the tensor sent, as (2, 3)")
    return shape


def check_gatherv(
    input_: torch.Tensor | Sequence[torch.Tensor],
    dim: int,
    sizes: Sequence[int] | None,
    rank: int,
    world_size: int,
) -> tuple[list[int], tuple[int, ...] | None]:
    """The dimension of each tensor given to `all_gatherv`, and the length along it on each rank, if given.

    Raises:
        UsageError: when sizes do not fit the group or a tensor.
        ConfigError: when something given is no dense tensor.
    """
    if not isinstance(input_, torch.Tensor | list | tuple):
        raise ConfigError(f"all_gatherv takes a torch.Tensor or a list of them, not {type(input_).__name__}")
    many = [input_] if isinstance(input_, torch.Tensor) else input_
    at = [dim_of("all_gatherv", x, dim) for x in many]
    lengths = sizes_of("all_gatherv", sizes, world_size)
    for x, d in zip(many, at, strict=True):
        if lengths is not None and x.shape[d] != lengths[rank]:
            raise UsageError(
                f"{list(x.shape)} != {lengths[rank]}: rank {rank} gives all_gatherv another number of rows "
                f"than sizes={list(lengths)} says"
            )
    return at, lengths


def scatter_of(
    verb: str, x: torch.Tensor, dim: int, sizes: Sequence[int] | None, world_size: int
) -> tuple[int, tuple[int, ...] | None]:
    """The dimension along which x is given out, and the length that each rank gets, if given.

    Raises:
        UsageError: when there is no such dimension, or its length is not what the ranks get together.
        ConfigError: when x is no dense tensor.
    """
    at, lengths = dim_of(verb, x, dim), sizes_of(verb, sizes, world_size)
    rows = x.shape[at]
    if lengths is None and rows % world_size:
        raise UsageError(
            f"{verb}: {rows} rows along dim {dim} do not divide among {world_size} ranks; "
            "give reduce_scatterv their sizes"
        )
    if lengths is not None and sum(lengths) != rows:
        raise UsageError(
            f"{rows} != {sum(lengths)}: {verb} along dim {dim} of {list(x.shape)} with "
            f"sizes={list(lengths)}, which have to add up to it"
        )
    return at, lengths
