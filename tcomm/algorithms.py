"""What each algorithm of each engine can do. Facts, not preferences: those are in the tuning tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist

from tcomm.errors import ConfigError

__all__ = [
    "ALGORITHMS",
    "DIRECT_ALGORITHMS",
    "FAMILIES",
    "GPU_ALGORITHMS",
    "REDUCE_OPS",
    "REDUCING",
    "Algorithm",
    "Needs",
    "acc_dtype",
    "combine_of",
    "reduce_op_name",
]

REDUCE_OPS = ("sum", "avg", "max", "min")
"""Reduce operations that kernels and the CPU path know."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_REDUCIBLE = (*_FLOATS, torch.float64, torch.int32, torch.int64)
_BARE_WORDS = (*_FLOATS, torch.int32)

_FALLBACK_OPS = ("product", "band", "bor", "bxor")


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a kernel needs of the GPUs that it runs on. All need peer access inside a node."""

    multicast: bool = False
    """Multicast addresses on every rank, each with a device of its own."""
    nvshmem: bool = False
    """NVSHMEM on every rank."""
    several_nodes: bool = False
    """Several nodes of equally many ranks; otherwise exactly one node."""
    min_sm: int = 80
    """The oldest NVIDIA architecture it is compiled for, as in `sm_80`."""


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """One way to do a collective, and what it can be asked for."""

    name: str
    """`engine:algorithm`, as it is forced, explained and signed."""
    dtypes: tuple[torch.dtype, ...]
    """Element types it reduces; none where data only moves and any type will do."""
    ops: tuple[str, ...] = REDUCE_OPS
    """Reduce operations it knows, where it reduces."""
    needs: Needs = Needs()
    """What it needs of GPUs."""
    fixed_order: bool = True
    """Whether it adds in an order that it says itself, so that bits repeat; a switch adds as it likes."""

    @property
    def engine(self) -> str:
        """`cpu` or `triton`."""
        return self.name.partition(":")[0]

    def refusal(self, op: str, dtype: torch.dtype) -> str:
        """Why it cannot reduce `dtype` by `op`; empty when it can."""
        if not self.dtypes:
            return ""
        if op not in self.ops:
            return f"{op} is not among {', '.join(self.ops)}"
        if op == "avg" and not dtype.is_floating_point:
            return f"the average of {dtype} is not a {dtype}"
        if dtype not in self.dtypes:
            return f"{dtype} is not among {', '.join(str(d).removeprefix('torch.') for d in self.dtypes)}"
        return ""


_PULL_OR_PUSH = ("cpu:pull", "cpu:push", "triton:pull", "triton:push")
_MOVING = tuple(Algorithm(name, ()) for name in _PULL_OR_PUSH)
_REDUCING = tuple(Algorithm(name, _REDUCIBLE) for name in _PULL_OR_PUSH)

ALGORITHMS = {
    "all_reduce": (
        Algorithm("cpu:one_shot_push", _REDUCIBLE),
        Algorithm("cpu:one_shot_pull", _REDUCIBLE),
        Algorithm("cpu:two_shot", _REDUCIBLE),
        Algorithm("triton:one_shot_ll", _BARE_WORDS),
        Algorithm("triton:one_shot_push", _REDUCIBLE),
        Algorithm("triton:one_shot_pull", _REDUCIBLE),
        Algorithm("triton:two_shot", _REDUCIBLE),
    ),
    "reduce": _REDUCING,
    "reduce_scatter": _REDUCING,
    "all_gather": _MOVING,
    "gather": _MOVING,
    "broadcast": _MOVING,
    "scatter": _MOVING,
    "all_to_all": _MOVING,
    "barrier": (Algorithm("cpu:arrival", ()), Algorithm("triton:arrival", ())),
    "point_to_point": (Algorithm("cpu:mailbox", ()), Algorithm("triton:mailbox", ())),
}
"""All that can be done besides by torch.distributed, by family: equal and unequal parts are one."""

_MULTIMEM = Needs(multicast=True, min_sm=90)
_HIERARCHICAL = Needs(nvshmem=True, several_nodes=True)

GPU_ALGORITHMS = {
    "all_reduce": (
        Algorithm("triton:multimem_one_shot", _FLOATS, ("sum",), _MULTIMEM, fixed_order=False),
        Algorithm("triton:multimem_two_shot", _FLOATS, ("sum",), _MULTIMEM, fixed_order=False),
        Algorithm("triton:hierarchical", _REDUCIBLE, needs=_HIERARCHICAL),
    ),
    "reduce_scatter": (Algorithm("triton:multimem", _FLOATS, ("sum",), _MULTIMEM, fixed_order=False),),
    "all_gather": (
        Algorithm("triton:multimem", (), needs=_MULTIMEM),
        Algorithm("triton:hierarchical", (), needs=_HIERARCHICAL),
    ),
}
"""What only GPUs have instructions for, by family; it has no form on host memory, interpreted or not."""

DIRECT_ALGORITHMS = {"all_reduce": (Algorithm("cpu:two_shot_direct", _REDUCIBLE),)}
"""What needs its result in memory of `Communicator.symmetric_empty`, by family: peers write to it."""

FAMILIES = {
    "all_reduce": "all_reduce",
    "reduce": "reduce",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatterv": "reduce_scatter",
    "all_gather_single": "all_gather",
    "all_gatherv": "all_gather",
    "gather": "gather",
    "broadcast": "broadcast",
    "scatter": "scatter",
    "all_to_all_single": "all_to_all",
    "barrier": "barrier",
    "send": "point_to_point",
    "recv": "point_to_point",
}
"""Family of every verb of the communicator."""

REDUCING = ("all_reduce", "reduce", "reduce_scatter")
"""Families that reduce; the others only move data."""


def combine_of(op: str) -> Callable[..., torch.Tensor]:
    """Reduces two tensors, with `out=`; an average is a sum until it is scaled."""
    combine: dict[str, Any] = {"sum": torch.add, "avg": torch.add, "max": torch.maximum, "min": torch.minimum}
    return cast("Callable[..., torch.Tensor]", combine[op])


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that values of `dtype` are accumulated in."""
    return torch.float32 if dtype in _FLOATS else dtype


def reduce_op_name(op: object) -> str:
    """The plain name of a reduce operation given as a string or as `torch.distributed.ReduceOp`.

    Raises:
        ConfigError: when it is neither.
    """
    if isinstance(op, dist.ReduceOp):
        kinds = dist.ReduceOp.RedOpType.__members__.items()
        name = next(known.lower() for known, kind in kinds if op == kind)  # type: ignore[comparison-overlap]
    else:
        name = str(op).rpartition(".")[2].lower()
    if name not in REDUCE_OPS + _FALLBACK_OPS:
        raise ConfigError(
            f"reduce operation {op!r} is unknown; give one of {', '.join(REDUCE_OPS + _FALLBACK_OPS)} "
            "or a torch.distributed.ReduceOp"
        )
    return name
