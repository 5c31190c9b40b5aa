"""Collectives that autograd knows, by themselves and in compiled graphs.

The gradient is that of the sum of all ranks' losses, as in `torch.distributed.nn`. Where every rank computes
the same loss, and it counts once, `copy_to_group` and `reduce_from_group` are right instead.

Each gradient is itself differentiable. Every rank has to go backward too, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library

from tcomm.algorithms import reduce_op_name
from tcomm.errors import ConfigError
from tcomm.groups.arguments import check_dim, check_rank, has_tangent
from tcomm.groups.compiled.engines import find_engine, name_of
from tcomm.groups.compiled.library import direct_register_custom_op

__all__ = [
    "all_gather",
    "all_reduce",
    "all_to_all",
    "broadcast",
    "copy_to_group",
    "reduce_from_group",
    "reduce_scatter",
]

_LIBRARY = Library("tcomm_functional", "FRAGMENT")
_ops = torch.ops.tcomm_functional


def all_reduce(x: torch.Tensor, group: object, op: object = "sum") -> torch.Tensor:
    """The sum or average over the ranks. Its gradient: the same, of the gradients. **Collective.**

    Args:
        x: any shape and stride, of a floating-point or complex dtype where a gradient is wanted.
        group: a Communicator, what has one, or the name of a registered group. Compiled code takes a name.
        op: `sum` or `avg`, or the same as a `torch.distributed.ReduceOp`.

    Returns:
        A new contiguous tensor.

    Raises:
        ConfigError: for another operation, which has another gradient or none.
        CapabilityError, CommError: as `Communicator.all_reduce` does.
    """
    return _call("all_reduce", x, name_of(group), _linear("all_reduce", op))


def all_gather(x: torch.Tensor, group: object, dim: int = 0) -> torch.Tensor:
    """All ranks' tensors along `dim`. Its gradient: the reduce-scatter of gradients. **Collective.**

    Args:
        x: [..., N, ...] of one shape and dtype on every rank.
        group: as for `all_reduce`.
        dim: may be negative.

    Returns:
        [..., W * N, ...].

    Raises:
        ConfigError, CapabilityError, CommError: as `Communicator.all_gather_single` does.
    """
    return _call("all_gather", x, name_of(group), _dim_of("all_gather", x, dim))


def reduce_scatter(x: torch.Tensor, group: object, dim: int = 0, op: object = "sum") -> torch.Tensor:
    """This rank's chunk of the sum or average. Its gradient: the all-gather of gradients. **Collective.**

    Args:
        x: [..., W * N, ...] of one shape and dtype on every rank.
        group: as for `all_reduce`.
        dim: may be negative.
        op: as for `all_reduce`; the gradient of an average is divided by W.

    Returns:
        [..., N, ...].

    Raises:
        ConfigError, CapabilityError, CommError: as `Communicator.reduce_scatter_single` does.
    """
    at = _dim_of("reduce_scatter", x, dim)
    return _call("reduce_scatter", x, name_of(group), at, _linear("reduce_scatter", op))


def all_to_all(x: torch.Tensor, group: object) -> torch.Tensor:
    """Chunk `r` of x to rank `r`. Its gradient: the all-to-all of gradients. **Collective.**

    Args:
        x: [W * N, ...] of one shape and dtype on every rank.
        group: as for `all_reduce`.

    Returns:
        [W * N, ...], the chunks that came, in the order of ranks.

    Raises:
        ConfigError, CapabilityError, CommError: as `Communicator.all_to_all_single` does.
    """
    return _call("all_to_all", x, name_of(group))


def broadcast(x: torch.Tensor, group: object, src: int = 0) -> torch.Tensor:
    """The tensor of rank `src`. Its gradient: the sum of gradients there, zero elsewhere. **Collective.**

    Args:
        x: of one shape and dtype on every rank; its values count on `src` only.
        group: as for `all_reduce`.
        src: rank within the group.

    Returns:
        A new tensor.

    Raises:
        ConfigError, CapabilityError, CommError: as `Communicator.broadcast` does.
    """
    if type(src) is not int:
        raise ConfigError(f"src={src!r} of tcomm.functional.broadcast is not a rank of the group")
    return _call("broadcast", x, name_of(group), src)


def copy_to_group(x: torch.Tensor, group: object) -> torch.Tensor:
    """What all ranks hold alike, as it is. Its gradient: the sum of gradients. Backward is **Collective.**

    Stands before what each rank computes differently, as a layer split by columns.

    Args:
        x: the same on every rank.
        group: as for `all_reduce`.

    Returns:
        A view of x.

    Raises:
        ConfigError, CapabilityError, CommError: in backward, as `Communicator.all_reduce` does.
    """
    _check_tensor("copy_to_group", x)
    copied: torch.Tensor = _CopyToGroup.apply(x, name_of(group))  # type: ignore[no-untyped-call]
    return copied


def reduce_from_group(x: torch.Tensor, group: object) -> torch.Tensor:
    """The sum over the ranks, a value that all hold alike. Its gradient: that of the sum. **Collective.**

    Stands behind what each rank computes differently, as a layer split by rows. Backward sends nothing.

    Args:
        x: any shape and stride.
        group: as for `all_reduce`.

    Returns:
        A new contiguous tensor.

    Raises:
        ConfigError, CapabilityError, CommError: as `Communicator.all_reduce` does.
    """
    return _call("reduce_from_group", x, name_of(group))


def _call(op: str, x: torch.Tensor, *args: object) -> torch.Tensor:
    _check_tensor(op, x)
    if has_tangent(x):
        raise ConfigError(
            f"tcomm.functional.{op} has no gradient of forward mode; call it on unpack_dual(x).primal, and "
            "again on its tangent"
        )
    result: torch.Tensor = getattr(_ops, op)(x, *args)
    return result


def _check_tensor(verb: str, x: torch.Tensor) -> None:
    # Less than a communicator asks for: tracers bring tensors of their own kinds.
    if not isinstance(x, torch.Tensor):
        raise ConfigError(f"tcomm.functional.{verb} takes a torch.Tensor, not {type(x).__name__}")


def _dim_of(verb: str, x: torch.Tensor, dim: int) -> int:
    _check_tensor(verb, x)
    if isinstance(dim, bool):
        raise ConfigError(f"dim={dim} of tcomm.functional.{verb} is no integer")
    return check_dim(f"tcomm.functional.{verb}", x.shape, dim)


def _linear(verb: str, op: object) -> str:
    name = reduce_op_name(op)
    if name not in {"sum", "avg"}:
        raise ConfigError(
            f"tcomm.functional.{verb} knows the gradient of sum and avg, not of {name}; call the "
            "communicator under torch.no_grad() where no gradient is wanted"
        )
    return name


class _CopyToGroup(torch.autograd.Function):
    """Forward costs nothing; what an op returns could not be a view."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return reduce_from_group(gradient, ctx.group), None


def _all_reduce(x: torch.Tensor, group: str, op: str) -> torch.Tensor:
    communicator, algorithm = find_engine(group)
    return communicator.all_reduce(x, op, algorithm=algorithm)


def _reduce_from_group(x: torch.Tensor, group: str) -> torch.Tensor:
    return _all_reduce(x, group, "sum")


def _all_gather(x: torch.Tensor, group: str, dim: int) -> torch.Tensor:
    communicator, algorithm = find_engine(group)
    return communicator.all_gather_single(x, dim=dim, algorithm=algorithm)


def _reduce_scatter(x: torch.Tensor, group: str, dim: int, op: str) -> torch.Tensor:
    communicator, algorithm = find_engine(group)
    return communicator.reduce_scatter_single(x, op, dim=dim, algorithm=algorithm)


def _all_to_all(x: torch.Tensor, group: str) -> torch.Tensor:
    communicator, algorithm = find_engine(group)
    return communicator.all_to_all_single(x, algorithm=algorithm)


def _broadcast(x: torch.Tensor, group: str, src: int) -> torch.Tensor:
    communicator, algorithm = find_engine(group)
    check_rank("broadcast", "src", src, communicator.world_size)
    return communicator.broadcast(x, src, algorithm=algorithm)


def _reduce_to(x: torch.Tensor, group: str, root: int) -> torch.Tensor:
    """The sum on `root`, zeros elsewhere."""
    communicator, algorithm = find_engine(group)
    total = communicator.reduce(x, root, algorithm=algorithm)
    return x.new_zeros(x.shape) if total is None else total


def _like(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _gathered(x: torch.Tensor, group: str, dim: int) -> torch.Tensor:
    shape, at = list(x.shape), check_dim("all_gather", x.shape, dim)
    shape[at] *= find_engine(group).communicator.world_size
    return x.new_empty(shape)


def _scattered(x: torch.Tensor, group: str, dim: int, op: str) -> torch.Tensor:  # noqa: ARG001
    shape, at = list(x.shape), check_dim("reduce_scatter", x.shape, dim)
    shape[at] //= find_engine(group).communicator.world_size
    return x.new_empty(shape)


def _keep_arguments(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG001
    ctx.arguments = inputs[1:]


def _differentiate_all_gather(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    group, dim = ctx.arguments
    return _ops.reduce_scatter(gradient, group, dim, "sum"), None, None


def _differentiate_reduce_scatter(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    group, dim, op = ctx.arguments
    share = gradient if op == "sum" else gradient / find_engine(group).communicator.world_size
    return _ops.all_gather(share, group, dim), None, None, None


def _define(
    name: str,
    op: Callable[..., torch.Tensor],
    fake: Callable[..., torch.Tensor],
    gradient: Callable[..., tuple[Any, ...]],
) -> None:
    direct_register_custom_op(name, op, fake_impl=fake, target_lib=_LIBRARY)
    torch.library.register_autograd(
        f"tcomm_functional::{name}", gradient, setup_context=_keep_arguments, lib=_LIBRARY
    )


_define("all_reduce", _all_reduce, _like, lambda ctx, g: (_ops.all_reduce(g, *ctx.arguments), None, None))
_define("all_gather", _all_gather, _gathered, _differentiate_all_gather)
_define("reduce_scatter", _reduce_scatter, _scattered, _differentiate_reduce_scatter)
_define("all_to_all", _all_to_all, _like, lambda ctx, g: (_ops.all_to_all(g, *ctx.arguments), None))
_define("broadcast", _broadcast, _like, lambda ctx, g: (_ops.reduce_to(g, *ctx.arguments), None, None))
_define("reduce_to", _reduce_to, _like, lambda ctx, g: (_ops.broadcast(g, *ctx.arguments), None, None))
_define(
    "reduce_from_group",
    _reduce_from_group,
    _like,
    lambda ctx, g: (copy_to_group(g, *ctx.arguments), None),
)
