"""The process groups of torch.distributed under a coordinator: one for its device, one for the host."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence

import torch
import torch.distributed as dist

from tcomm.errors import UsageError

__all__ = ["ProcessGroups", "device_of", "find_my_ranks", "new_process_group"]

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
    ranks: Sequence[int], backend: str, desc: str, seconds: float | None
) -> dist.ProcessGroup:
    """A process group of `ranks`, this process among them. **Collective** over `ranks` alone.

    Other ranks need not take part: the groups of a layout are made at the same time, and a rank makes only
    those that it is in.
    """
    timeout = _FOR_EVER if seconds is None else datetime.timedelta(seconds=seconds)
    group: dist.ProcessGroup = dist.new_group(
        list(ranks), timeout, backend, use_local_synchronization=True, group_desc=desc
    )
    return group


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
    def create(cls, ranks: Sequence[int], backend: str, name: str, seconds: float | None) -> ProcessGroups:
        """Both groups of `ranks`, as `new_process_group` makes them. **Collective** over `ranks`."""
        device_group = new_process_group(ranks, backend, f"{name}/device", seconds)
        cpu_group = new_process_group(ranks, "gloo", f"{name}/cpu", seconds)
        return cls(device_group, cpu_group, [device_group, cpu_group])

    @classmethod
    def adopt(cls, group: dist.ProcessGroup, name: str, seconds: float | None) -> ProcessGroups:
        """A group that somebody else made and ends, with gloo beside it if it has none. **Collective.**"""
        if "gloo" in dist.get_backend_config(group):
            return cls(group, group, [])
        cpu_group = new_process_group(dist.get_process_group_ranks(group), "gloo", f"{name}/cpu", seconds)
        return cls(group, cpu_group, [cpu_group])

    def destroy(self) -> None:
        """End what was made here. May be called twice."""
        while self.owned:
            group = self.owned.pop()
            if dist.is_initialized():
                dist.destroy_process_group(group)
