"""Checks of what a coordinator is made of, before anything is made."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tcomm.errors import UsageError

__all__ = ["backend_of", "check_initialized", "local_rank_of", "name_of", "process_group_of", "rows_of"]


def check_initialized() -> None:
    """Check that there is a world.

    Raises:
        UsageError: when torch.distributed is not initialized.
    """
    if not dist.is_initialized():
        raise UsageError("torch.distributed is not initialized; call init_distributed_environment() first")


def rows_of(group_ranks: Sequence[Sequence[int]]) -> list[list[int]]:
    """`group_ranks` as lists of plain integers.

    Raises:
        UsageError: when it is no list of lists of integers.
    """
    try:
        rows = [[_integer(rank) for rank in row] for row in group_ranks]
    except TypeError:
        rows = []
    if not rows or not all(rows):
        raise UsageError(
            f"group_ranks={group_ranks!r} is no list of lists of ranks; give one list for each group, not an "
            "empty one, such as [[0, 1], [2, 3]]"
        )
    return rows


def local_rank_of(local_rank: int) -> int:
    """`local_rank` as a plain integer.

    Raises:
        UsageError: when it is none, or less than -1.
    """
    try:
        number = _integer(local_rank)
    except TypeError:
        number = -2
    if number < -1:
        raise UsageError(f"local_rank={local_rank!r} is no number of a process on its host; give 0 or more")
    return number


def name_of(group_name: str | None) -> str:
    """`group_name`, or "anonymous" where there is none.

    Raises:
        UsageError: when it is no string.
    """
    if group_name is not None and not isinstance(group_name, str):
        raise UsageError(f"group_name={group_name!r} is no string")
    return group_name or "anonymous"


def backend_of(backend: str) -> str:
    """`backend` as a plain string: a name, or names by type of device as in `cpu:gloo,cuda:nccl`.

    Raises:
        UsageError: when this torch does not know one of them, or it cannot be used here.
    """
    if not isinstance(backend, str):
        raise UsageError(f"torch_distributed_backend={backend!r} is no string; give gloo or nccl")
    for part in backend.lower().split(","):
        name = part.rpartition(":")[2]
        if name == dist.Backend.UNDEFINED or name not in dist.Backend.backend_list:
            known = ", ".join(sorted({*dist.Backend.backend_list} - {dist.Backend.UNDEFINED}))
            raise UsageError(f"torch.distributed knows no backend {backend!r}; it knows {known}")
        if not dist.is_backend_available(name) or (name == "nccl" and not torch.cuda.is_available()):
            raise UsageError(f"backend {backend!r} cannot be used here: {name} or its device is missing")
    return str(backend)


def process_group_of(group: dist.ProcessGroup | DeviceMesh) -> dist.ProcessGroup:
    """The process group itself, or that of a mesh of one dimension.

    Raises:
        UsageError: when there is none, or torch.distributed does not know it.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise UsageError(
                f"a mesh of {group.ndim} dimensions is not one group; take one, as in mesh['tp']"
            )
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise UsageError(
            f"{group!r} is no process group that this rank is in; give a torch.distributed.ProcessGroup or a "
            "DeviceMesh of one dimension"
        )
    try:
        dist.get_process_group_ranks(group)
    except KeyError:
        raise UsageError("torch.distributed does not know this process group, or not any more") from None
    return group


def _integer(value: int) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{value} is no number")
    return int(operator.index(value))
