"""How even a load is over the ranks."""

from __future__ import annotations

import dataclasses

import torch

from tcomm.eplb.shapes import Shape

__all__ = ["EplbStats", "LoadStatistics", "rank_loads"]


@dataclasses.dataclass(frozen=True)
class LoadStatistics:
    """How even the load of a step was, summed over layers."""

    avg_tokens: float
    """Tokens of a rank in the mean."""
    max_tokens: float
    """Tokens of the busiest rank of each layer."""

    @property
    def balancedness(self) -> float:
        """`avg_tokens / max_tokens`: 1 is even; 0 without any token."""
        return self.avg_tokens / self.max_tokens if self.max_tokens else 0.0

    @classmethod
    def of(cls, loads: torch.Tensor) -> LoadStatistics:
        """The statistics of a step.

        Args:
            loads: [L, G], tokens of each rank in each layer. Mean and maximum are taken over ranks.
        """
        return cls(
            float(loads.to(torch.float64).mean(dim=1).sum()),
            float(loads.amax(dim=1).sum()) if len(loads) else 0.0,
        )


def rank_loads(load_pass: torch.Tensor, num_ranks: int, own_rank: int | None) -> torch.Tensor:
    """What this rank knows of the tokens of each rank: the sum over all ranks' is the load.

    Args:
        load_pass: [L, P], tokens of all slots; or [L, P / G], of the slots of `own_rank`.
        num_ranks: G.
        own_rank: whose slots were counted; None: all ranks'.

    Returns:
        [L, G] int64 in host memory.
    """
    load = load_pass.to("cpu", torch.int64)
    if own_rank is None:
        return load.view(len(load), num_ranks, load.shape[1] // num_ranks).sum(dim=2)
    loads = torch.zeros((len(load), num_ranks), dtype=torch.int64, device="cpu")
    loads[:, own_rank] = load.sum(dim=1)
    return loads


@dataclasses.dataclass(frozen=True, eq=False)
class EplbStats:
    """What a plan is made from."""

    global_expert_load_window: torch.Tensor
    """[L, E] int64 in host memory: tokens of each expert, over all ranks and the steps of the window."""
    num_replicas: int
    """Slots, P."""
    num_groups: int
    """Groups of experts."""
    num_nodes: int
    """Nodes that share the ranks evenly."""
    num_gpus: int
    """Ranks, G."""

    @property
    def shape(self) -> Shape:
        """The numbers, for planning.

        Raises:
            ConfigError: when they do not fit together.
        """
        return Shape(
            self.global_expert_load_window.shape[1], self.num_replicas, self.num_groups, self.num_nodes,
            self.num_gpus,
        )  # fmt: skip
