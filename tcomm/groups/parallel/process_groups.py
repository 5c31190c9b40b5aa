"""The process groups of torch.distributed under a coordinator: one for its device, one for the host."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from tcomm.config import EngineConfig
from tcomm.errors import CapabilityError, UsageError

__all__ = ["ProcessGroups", "device_of", "find_my_ranks", "new_process_group", "resolve_local_rank"]

_FOR_EVER = datetime.timedelta(days=7)


def find_my_ranks(group_ranks: Sequence[Sequence[int]], rank: int, world_size: int) -> list[int]:
    """The list that `rank` is in.

    Raises:
        UsageError: unless each rank of the world is in exactly one list; before anything is created.
    """
    everyone = sorted(r for ranks in group_ranks for r in ranks)
    if everyone != list(range(world_size)):
        lost = sorted(set(range(world_size)) - set(everyone))
        raise UsageError(
            f"each of the {world_size} ranks must be in exactly one group, and "
            f"{[list(row) for row in group_ranks]} "
            + (f"leaves out {lost}" if lost else "names some twice, or ranks that do not exist")
        )
    return list(next(ranks for ranks in group_ranks if rank in ranks))


def device_of(backend: str, local_rank: int) -> torch.device:
    """The device whose tensors a group of this backend moves: alike where backends are."""
    if local_rank >= 0 and torch.cuda.is_available() and str(backend) != "gloo":
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def new_process_group(
    group_ranks: Sequence[Sequence[int]], backend: str, desc: str, seconds: float | None
) -> dist.ProcessGroup:
    """The process group of this rank, of one for each row. **Collective** over the world.

    Ranks within a group are in the order of its row.

    Raises:
        CapabilityError: when a row is not in ascending order and this torch would sort it.
    """
    options: dict[str, Any] = {}
    if any(list(ranks) != sorted(ranks) for ranks in group_ranks):
        if "sort_ranks" not in inspect.signature(dist.new_group).parameters:
            raise CapabilityError(
                f"torch {torch.__version__} would sort the ranks of {[list(r) for r in group_ranks]}; "
                "groups in another order need torch 2.13"
            )
        options["sort_ranks"] = False
    timeout = _FOR_EVER if seconds is None else datetime.timedelta(seconds=seconds)
    mine: dist.ProcessGroup | None = None
    for ranks in group_ranks:
        made = dist.new_group(list(ranks), timeout, backend, group_desc=desc, **options)
        mine = made if dist.get_rank() in ranks else mine
    if mine is None:
        raise UsageError(f"rank {dist.get_rank()} is in none of {[list(row) for row in group_ranks]}")
    return mine


def resolve_local_rank(local_rank: int) -> int:
    """`local_rank`, or for -1 LOCAL_RANK, or the global rank where that is unset."""
    if local_rank != -1:
        return local_rank
    known = EngineConfig.from_environment().local_rank
    return dist.get_rank() if known is None else known


@dataclasses.dataclass
class ProcessGroups:
    """What torch.distributed knows of a coordinator's ranks."""

    device_group: dist.ProcessGroup
    """Of the backend asked for."""
    cpu_group: dist.ProcessGroup
    """Of gloo."""
    owned: list[dist.ProcessGroup]
    """Those that end with the coordinator."""

    @classmethod
    def create(
        cls, group_ranks: Sequence[Sequence[int]], backend: str, name: str, seconds: float | None
    ) -> ProcessGroups:
        """Both groups of this rank. **Collective** over the world.

        Raises:
            CapabilityError: as `new_process_group` does.
        """
        device_group = new_process_group(group_ranks, backend, f"{name}/device", seconds)
        cpu_group = new_process_group(group_ranks, "gloo", f"{name}/cpu", seconds)
        return cls(device_group, cpu_group, [device_group, cpu_group])

    @classmethod
    def adopt(cls, group: dist.ProcessGroup) -> ProcessGroups:
        """A group that somebody else made and ends. Not collective.

        Raises:
            UsageError: when it cannot move host memory.
        """
        backends = dist.get_backend_config(group)
        if "gloo" not in backends:
            raise UsageError(
                f"the backends of this process group are {backends!r}; objects and barriers need gloo beside "
                'them: make it with backend="cpu:gloo,cuda:nccl"'
            )
        return cls(group, group, [])

    def destroy(self) -> None:
        """End what was made here. May be called twice."""
        while self.owned:
            group = self.owned.pop()
            # Somebody else may have ended it, or torch.distributed's whole world.
            with contextlib.suppress(ValueError, AssertionError):
                dist.destroy_process_group(group)
