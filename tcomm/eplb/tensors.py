"""The planning functions with tensors in and out, as vllm.distributed has them."""

from __future__ import annotations

import numpy as np
import torch

from tcomm.eplb.balance import balanced_maps
from tcomm.eplb.maps import logical_maps
from tcomm.eplb.shapes import LoadArray, Shape
from tcomm.errors import ConfigError

__all__ = ["compute_logical_maps", "load_of", "rebalance_experts", "shape_of"]


def load_of(weight: torch.Tensor) -> LoadArray:
    """A load [L, E] on the host; of a dtype that numpy lacks, as float32.

    Raises:
        ConfigError: when it is no tensor of real numbers.
    """
    if not isinstance(weight, torch.Tensor) or weight.is_complex():
        raise ConfigError(f"weight is {type(weight).__name__}; give a real tensor [layers, experts]")
    host = weight.detach().to("cpu")
    if host.is_floating_point() and host.dtype not in {torch.float16, torch.float32, torch.float64}:
        host = host.to(torch.float32)
    return host.numpy()


def shape_of(load: LoadArray, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> Shape:
    """The numbers of a plan for a load [L, E].

    Raises:
        ConfigError: when the load has another number of axes, or the numbers do not fit together.
    """
    if load.ndim != 2:
        raise ConfigError(f"a load of shape {list(load.shape)} is wrong; give [layers, experts]")
    return Shape(load.shape[1], num_replicas, num_groups, num_nodes, num_gpus)


def rebalance_experts(
    weight: torch.Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plan where experts go: groups to nodes, replicas within a node, replicas to its GPUs.

    Args:
        weight: [L, E], load of each expert; any real dtype and device; taken as float32.
        num_replicas: P, slots; a multiple of `num_gpus`, and E or more.
        num_groups: groups of neighbouring experts.
        num_nodes: nodes; where they do not divide the groups, any expert may go anywhere.
        num_gpus: expert-parallel ranks; slot p is on rank `p // (P / num_gpus)`.

    Returns:
        int64 on the CPU: phy2log [L, P], the expert in each slot; log2phy [L, E, P - E + 1], the slots of
        each expert, filled up with -1; logcnt [L, E], how many they are. Equal loads are taken in order.

    Raises:
        ConfigError: when the numbers do not divide, or a load is negative, infinite or not a number.
    """
    load = load_of(weight)
    maps = balanced_maps(load, shape_of(load, num_replicas, num_groups, num_nodes, num_gpus))
    phy2log, log2phy, logcnt = map(torch.from_numpy, maps)
    return phy2log, log2phy, logcnt


def compute_logical_maps(
    phy2log: torch.Tensor, num_logical_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the replicas of each expert are.

    Args:
        phy2log: [L, P] or [P], the expert in each slot; -1 for none.
        num_logical_experts: E.

    Returns:
        int64 on the device of the map: [..., E, the most replicas of one expert], slots rising, filled up
        with -1; and replicas of each expert, [..., E].

    Raises:
        ConfigError: when the map is of another shape or dtype, or names an expert that is not there.
    """
    given = phy2log.detach().to("cpu").numpy()
    if given.ndim not in {1, 2} or given.dtype.kind not in "iu":
        raise ConfigError(
            f"phy2log is {phy2log.dtype} {list(phy2log.shape)}; give integers [layers, slots] or [slots]"
        )
    array = np.atleast_2d(given).astype(np.int64)
    wrong = (array < -1) | (array >= num_logical_experts)
    if wrong.any():
        raise ConfigError(f"phy2log names expert {array[wrong][0]}; give -1 to {num_logical_experts - 1}")
    maps = logical_maps(array, num_logical_experts)
    log2phy, counts = (torch.from_numpy(found if given.ndim == 2 else found[0]) for found in maps)
    return log2phy.to(phy2log.device), counts.to(phy2log.device)
