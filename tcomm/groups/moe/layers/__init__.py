"""One call for a layer of routed experts, whichever way its tokens travel.

The backends differ in what the experts see. *Flat* ones hand over rows with the local experts of each, and
take back the weighted sums of those; *batched* ones hand over the rows of each local expert, and weight what
comes back themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from tcomm.errors import ConfigError
from tcomm.groups.arguments import UNSET, Timeout, Unset
from tcomm.groups.moe.expert_ids import check_divides
from tcomm.groups.moe.layers.batched import LowLatencyLayer
from tcomm.groups.moe.layers.contract import Backend, Experts, MoeShape
from tcomm.groups.moe.layers.flat import HighThroughputLayer, OneSidedLayer, TwoSidedLayer
from tcomm.groups.moe.layers.gathered import GatheringLayer, NaiveLayer

__all__ = ["BACKENDS", "Backend", "Experts", "MoeShape", "make_backend"]

BACKENDS: dict[str, Callable[..., Backend]] = {
    "high_throughput": HighThroughputLayer,
    "low_latency": LowLatencyLayer,
    "one_sided": OneSidedLayer,
    "two_sided": TwoSidedLayer,
    "all_gather": GatheringLayer,
    "naive": NaiveLayer,
}
"""Every way, by name."""


def make_backend(
    name: str, shape: MoeShape, group: dist.ProcessGroup | None = None, timeout: Timeout | Unset = UNSET
) -> Backend:
    """A way for the tokens of a layer. **Collective.**

    Args:
        name: a key of `BACKENDS`.
        shape: of the layers; the same on every rank.
        group: of the ranks; None: the default one.
        timeout: of calls: seconds, a profile, or None: as long as the peers live.

    Raises:
        ConfigError: when there is no such backend, or the ranks do not divide the experts.
        CapabilityError: when its buffers are too large; says needed and free bytes.
        RendezvousError: when a rank did not come.
    """
    if name not in BACKENDS:
        raise ConfigError(f"backend={name!r}: give one of {', '.join(BACKENDS)}")
    world_size = dist.get_world_size(group) if dist.is_initialized() else 1
    check_divides(shape.num_experts, world_size)
    return BACKENDS[name](shape, group, timeout)
