"""`tcomm::all_reduce`, `all_gather` and `reduce_scatter`: ops of torch that name their group.

They write to nothing and give memory of their own, as their schemas say. They have no gradient: a tensor that
requires one is refused, when it is called and when it is compiled.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from tcomm.errors import ConfigError, UsageError
from tcomm.groups.arguments import check_dim
from tcomm.groups.compiled.library import check_before_autograd, direct_register_custom_op
from tcomm.groups.compiled.registry import RegisteredGroup, find_group

__all__ = [
    "all_gather",
    "all_gather_fake",
    "all_reduce",
    "all_reduce_fake",
    "reduce_scatter",
    "reduce_scatter_fake",
    "refuse_gradient",
]


def all_reduce(tensor: torch.Tensor, group_name: str) -> torch.Tensor:
    """The sum over the ranks of a group. **Collective.**

    Args:
        tensor: any shape and stride; not modified.
        group_name: `unique_name` of the group.

    Returns:
        A new contiguous tensor.

    Raises:
        UsageError, ConfigError: when there is no such group, or not any more.
        ConfigError: when a gradient would be lost.
        CapabilityError, CommError: as `Communicator.all_reduce` does.
    """
    if tensor.requires_grad or forward_ad._current_level >= 0:
        refuse_gradient("all_reduce", tensor)
    return _own(find_group(group_name)._all_reduce_out_place(tensor), tensor)


def all_reduce_fake(tensor: torch.Tensor, group_name: str) -> torch.Tensor:  # noqa: ARG001
    """An empty tensor like the result of `all_reduce`.

    Raises:
        ConfigError: when a gradient would be lost.
    """
    refuse_gradient("all_reduce", tensor)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def reduce_scatter(tensor: torch.Tensor, dim: int, world_size: int, group_name: str) -> torch.Tensor:
    """The sum over the ranks of a group, of which each gets its chunk along `dim`. **Collective.**

    Args:
        tensor: [..., W * N, ...]; not modified.
        dim: may be negative.
        world_size: of the group; what the compiler knows of it.
        group_name: `unique_name` of the group.

    Returns:
        A new tensor [..., N, ...].

    Raises:
        UsageError: also when the group has another size.
        ConfigError, CapabilityError, CommError: as `all_reduce` does.
    """
    if tensor.requires_grad or forward_ad._current_level >= 0:
        refuse_gradient("reduce_scatter", tensor)
    group = _find_sized("reduce_scatter", group_name, world_size)
    return _own(group._reduce_scatter_out_place(tensor, dim), tensor)


def reduce_scatter_fake(tensor: torch.Tensor, dim: int, world_size: int, group_name: str) -> torch.Tensor:  # noqa: ARG001
    """An empty tensor like the result of `reduce_scatter`.

    Raises:
        ConfigError: when a gradient would be lost, or there is no such dimension.
    """
    refuse_gradient("reduce_scatter", tensor)
    shape, at = list(tensor.shape), check_dim("reduce_scatter", tensor.shape, dim)
    shape[at] //= world_size
    return tensor.new_empty(shape)


def all_gather(tensor: torch.Tensor, dim: int, world_size: int, group_name: str) -> torch.Tensor:
    """All ranks' tensors, one after another along `dim`. **Collective.**

    Args:
        tensor: [..., N, ...]; not modified.
        dim: may be negative.
        world_size: of the group; what the compiler knows of it.
        group_name: `unique_name` of the group.

    Returns:
        A new tensor [..., W * N, ...].

    Raises:
        UsageError: also when the group has another size.
        ConfigError, CapabilityError, CommError: as `all_reduce` does.
    """
    if tensor.requires_grad or forward_ad._current_level >= 0:
        refuse_gradient("all_gather", tensor)
    group = _find_sized("all_gather", group_name, world_size)
    return _own(group._all_gather_out_place(tensor, dim), tensor)


def all_gather_fake(tensor: torch.Tensor, dim: int, world_size: int, group_name: str) -> torch.Tensor:  # noqa: ARG001
    """An empty tensor like the result of `all_gather`.

    Raises:
        ConfigError: when a gradient would be lost, or there is no such dimension.
    """
    refuse_gradient("all_gather", tensor)
    shape, at = list(tensor.shape), check_dim("all_gather", tensor.shape, dim)
    shape[at] *= world_size
    return tensor.new_empty(shape)


def refuse_gradient(op: str, *tensors: torch.Tensor | None) -> None:
    """Check that no tensor is part of a differentiation.

    Raises:
        ConfigError: when one is; names the form that has a gradient.
    """
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise ConfigError(
            f"tcomm::{op} would lose the gradient of its input; call tcomm.functional instead, "
            "or this under torch.no_grad()"
        )
    # Inside of an op torch.func.jvp does not tell whose gradient is asked for.
    if forward_ad._current_level >= 0:
        raise ConfigError(
            f"tcomm::{op} would lose a gradient of forward mode; call it outside of torch.func.jvp and "
            "dual_level()"
        )


def _find_sized(op: str, name: str, world_size: int) -> RegisteredGroup:
    group = find_group(name)
    if group.world_size != world_size:
        raise UsageError(
            f"tcomm::{op}: world_size={world_size} is what the compiler was told; group {name} has "
            f"{group.world_size} ranks"
        )
    return group


def _own(result: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """`result`, or a copy: a group of one may give back what it was given."""
    return given.clone(memory_format=torch.contiguous_format) if result is given else result


direct_register_custom_op("all_reduce", all_reduce, fake_impl=all_reduce_fake)
direct_register_custom_op("reduce_scatter", reduce_scatter, fake_impl=reduce_scatter_fake)
direct_register_custom_op("all_gather", all_gather, fake_impl=all_gather_fake)
for _op in ("all_reduce", "reduce_scatter", "all_gather"):
    check_before_autograd(_op, refuse_gradient)
