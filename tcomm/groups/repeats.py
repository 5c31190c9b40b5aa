"""Knowing at a look that a call is like one that went through every check: the hot path of small messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._C._dynamo.guards import TensorGuards
from torch.autograd import forward_ad

from tcomm.groups.arguments import is_ordinary, is_plain, num_dispatch_modes
from tcomm.groups.plans import Plan
from tcomm.groups.pool import POOLED_BYTES

__all__ = ["Repeat", "make_repeat"]

Fits = Callable[[torch.Tensor, "torch.Tensor | None"], object]
"""Takes x and out as the caller gave them; true only where every check would pass, both being contiguous."""


class Repeat(NamedTuple):
    """A plan, and how to know the calls that may go to it without another check."""

    fits: Fits
    plan: Plan
    shape: torch.Size | None
    """Of the result; None where `torch.empty_like` of x makes it, in half of the time."""


def make_repeat(
    plan: Plan, shape: torch.Size, reach: int, x: torch.Tensor, out: torch.Tensor | None
) -> Repeat | None:
    """For calls like one that passes every check; None where the next ones have to pass them, too.

    Args:
        plan: of the call.
        shape: of its result.
        reach: bytes of the longer of x and out: so far apart, they do not overlap.
        x: its input.
        out: as the caller gave it, checked; may be x.
    """
    if not (is_ordinary(x) and is_plain(x)):
        return None
    is_like_x = shape == x.shape and (reach < POOLED_BYTES or not x.is_cpu)
    made = None if is_like_x else shape
    if out is None or out is x:
        return Repeat(_like_one(x, out is x), plan, made)
    if not (is_ordinary(out) and is_plain(out)):
        return None
    return Repeat(_like_two(x, out, reach), plan, made)


def _guard(*tensors: torch.Tensor) -> Callable[..., bool]:
    """Whether as many tensors are like these, in one look: what torch.compile asks of graphs it has made.

    It tells of type, dtype, device, shape and strides, of transforms, tracers and inference, and of the flags
    of gradients, negation and conjugation; not of all modes, nor of tangents. It ends the process when it is
    asked of a nested tensor.
    """
    make: Any = TensorGuards
    check: Callable[..., bool] = make(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    return check


def _like_one(x: torch.Tensor, is_in_place: bool) -> Fits:
    """Whether a tensor alone is like x; it is its own result, or has none yet."""
    is_alike = _guard(x)
    has_memory = not x.numel()

    def fits(x: torch.Tensor, out: torch.Tensor | None) -> object:
        return (
            (out is x if is_in_place else out is None)
            and not (x.is_nested or num_dispatch_modes())
            and forward_ad._current_level < 0
            and is_alike(x)
            and (has_memory or x.data_ptr())
        )

    return fits


def _like_two(x: torch.Tensor, out: torch.Tensor, reach: int) -> Fits:
    """Whether two tensors are like these, and apart."""
    is_alike = _guard(x, out)

    def fits(x: torch.Tensor, out: torch.Tensor | None) -> object:
        return (
            out is not None
            and not (x.is_nested or out.is_nested or num_dispatch_modes())
            and forward_ad._current_level < 0
            and is_alike(x, out)
            and (source := x.data_ptr())
            and (target := out.data_ptr())
            and abs(target - source) >= reach
        )

    return fits
