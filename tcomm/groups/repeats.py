"""Knowing at a look that a call is like one that went through every check: the hot path of small messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import is_inference_mode_enabled
from torch._C._dynamo.guards import TensorGuards
from torch.autograd import forward_ad

from tcomm.groups.arguments import NOTHING, is_ordinary, is_plain, num_dispatch_modes
from tcomm.groups.plans import Plan
from tcomm.groups.pool import POOLED_BYTES
from tcomm.memory.regions import Regions

__all__ = ["Ready", "Repeat", "find_repeat", "make_repeat"]

Fits = Callable[[torch.Tensor, "torch.Tensor | None"], object]
"""Takes x and out as the caller gave them; true only where every check would pass, both being contiguous."""

_MAX_REPEATS = 4
_MAX_KNOWN = 16
_LONGER_THAN_STORAGE = 1 << 42


class Repeat(NamedTuple):
    """A plan, and how to know the calls that may go to it without another check."""

    fits: Fits
    plan: Plan
    shape: torch.Size | None
    """Of the result; None where `torch.empty_like` of x makes it, in half of the time."""
    place: str
    """What ranks call the place of a result in symmetric memory; empty where it is elsewhere."""


class Ready(NamedTuple):
    """A plan for a kind of call, and what a call must be like to use it."""

    plan: Plan
    shape: torch.Size | None
    """Of the result; None where this rank gets none."""
    reach: int
    """Bytes of the longer of input and result: so far apart, they do not overlap."""
    may_alias: bool
    """Whether the result may go to the input itself."""
    repeats: list[Repeat]
    """For calls that have passed every check: with a result given or not, in inference mode or not."""


def find_repeat(
    repeats: Sequence[Repeat], x: torch.Tensor, out: torch.Tensor | None, regions: Regions
) -> Repeat | None:
    """The first that fits, if one does."""
    try:
        for repeat in repeats:
            if repeat.fits(x, out) and repeat.place == regions.find_name(out):
                return repeat
    except (AttributeError, TypeError, RuntimeError):
        pass
    return None


def make_repeat(ready: Ready, x: torch.Tensor, out: torch.Tensor | None, regions: Regions) -> Repeat | None:
    """For calls like one that has passed every check; None where the next ones have to pass them, too.

    Args:
        ready: plan of the call, which keeps the last few.
        x: its input.
        out: as the caller gave it; may be x.
        regions: symmetric memory of the group.
    """
    plan, shape = ready.plan, ready.shape
    if shape is None or not (is_ordinary(x) and is_plain(x)):
        return None
    if x is NOTHING:
        fits = _is_barrier(x)
    elif out is None or out is x:
        fits = _like_one(x, out is x)
    elif is_ordinary(out) and is_plain(out):
        fits = _like_two(x, out, ready.reach)
    else:
        return None
    is_like_x = shape == x.shape and (ready.reach < POOLED_BYTES or not x.is_cpu)
    repeat = Repeat(fits, plan, None if is_like_x else shape, regions.find_name(out))
    ready.repeats.append(repeat)
    del ready.repeats[:-_MAX_REPEATS]
    return repeat


def _guard(*tensors: torch.Tensor) -> Callable[..., bool]:
    """Whether as many tensors are like these, in one look: what torch.compile asks of graphs it has made.

    It tells of type, dtype, device, shape and strides, of transforms and tracers, and of the flags of
    gradients, negation and conjugation. It does not tell of all modes, nor of tangents; what was made in
    inference mode is for it, outside, what an ordinary tensor is inside; and it ends the process when it is
    asked of a nested tensor.
    """
    make: Any = TensorGuards
    check: Callable[..., bool] = make(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    return check


def _is_barrier(x: torch.Tensor) -> Fits:
    """Whether there are no tensors at all, for which this one of nobody else's stands."""
    is_alike = _guard(x)

    def fits(x: torch.Tensor, out: torch.Tensor | None) -> object:
        return x is NOTHING and out is NOTHING and not num_dispatch_modes() and is_alike(x)

    return fits


def _like_one(x: torch.Tensor, is_in_place: bool) -> Fits:
    """Whether a tensor alone is like x; it is its own result, or has none yet."""
    is_alike, in_inference, itemsize = _guard(x), is_inference_mode_enabled(), x.itemsize
    is_empty = not x.numel()

    def fits(x: torch.Tensor, out: torch.Tensor | None) -> object:
        return (
            (out is x if is_in_place else out is None)
            and not (x.is_nested or num_dispatch_modes())
            and is_inference_mode_enabled() is in_inference
            and forward_ad._current_level < 0
            and is_alike(x)
            and (is_empty or x.data_ptr() != x.storage_offset() * itemsize)
        )

    return fits


def _like_two(x: torch.Tensor, out: torch.Tensor, reach: int) -> Fits:
    """Whether two tensors are like these, and apart."""
    is_alike, in_inference, itemsize = _guard(x, out), is_inference_mode_enabled(), x.itemsize
    known: set[tuple[int, int]] = set()

    def are_apart(x: torch.Tensor, out: torch.Tensor) -> bool:
        source, target = x.data_ptr(), out.data_ptr()
        has_memory = source != x.storage_offset() * itemsize and target != out.storage_offset() * itemsize
        is_so = has_memory and abs(target - source) >= reach
        # Memory that was freed begins at 0; so far from there, no view of it lies.
        if is_so and min(source, target) > _LONGER_THAN_STORAGE:
            if len(known) >= _MAX_KNOWN:
                known.clear()
            known.add((source, target))
        return is_so

    def fits(x: torch.Tensor, out: torch.Tensor | None) -> object:
        return (
            out is not None
            and not (x.is_nested or out.is_nested or num_dispatch_modes())
            and is_inference_mode_enabled() is in_inference
            and forward_ad._current_level < 0
            and is_alike(x, out)
            and ((x.data_ptr(), out.data_ptr()) in known or are_apart(x, out))
        )

    return fits
