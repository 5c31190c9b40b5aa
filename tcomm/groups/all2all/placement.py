"""Which experts a rank has."""

from __future__ import annotations

import torch

from tcomm.errors import UsageError

__all__ = ["determine_expert_map"]


def determine_expert_map(
    ep_size: int,
    ep_rank: int,
    global_num_experts: int,
    expert_placement_strategy: str = "linear",
    num_fused_shared_experts: int = 0,
    return_expert_mask: bool = False,
) -> tuple[int, torch.Tensor | None, torch.Tensor | None]:
    """Spread experts over ranks as evenly as can be; the first ranks have one more.

    Example: 5 experts on 2 ranks; rank 1 has 2 of them: linear `[-1, -1, -1, 0, 1]`, round robin
    `[-1, 0, -1, 1, -1]`.

    Args:
        ep_size: ranks.
        ep_rank: this one.
        global_num_experts: routed experts of a layer.
        expert_placement_strategy: `linear`: neighbours together; `round_robin`: neighbours apart.
        num_fused_shared_experts: more experts that every rank has, behind the routed ones.
        return_expert_mask: make the mask, and let the map go on with the shared experts.

    Returns:
        The number of this rank's experts; int32 [E], or with the mask [E + shared]: the place of each expert
        among them, -1 for those of others; int32 [E + shared + 1]: 1 for what this rank has, 0 for the rest
        and for the last. A single rank has all: `(E, None, None)`.

    Raises:
        UsageError: an AssertionError and a ValueError; for a size, rank, number or strategy that is none.
    """
    if ep_size < 1 or not 0 <= ep_rank < ep_size:
        raise UsageError(f"rank {ep_rank} of {ep_size} ranks; ep_size is 1 or more and ep_rank below it")
    if global_num_experts < 0 or num_fused_shared_experts < 0:
        raise UsageError(f"{global_num_experts} routed and {num_fused_shared_experts} shared experts")
    if ep_size == 1:
        return global_num_experts, None, None
    base, more = divmod(global_num_experts, ep_size)
    number = base + (ep_rank < more)
    if expert_placement_strategy == "linear":
        first, step = ep_rank * base + min(ep_rank, more), 1
    elif expert_placement_strategy == "round_robin":
        first, step = ep_rank, ep_size
    else:
        raise UsageError(
            f"Unsupported expert placement strategy '{expert_placement_strategy}', expected one of "
            "('linear', 'round_robin')"
        )
    places = torch.full((global_num_experts,), -1, dtype=torch.int32, device="cpu")
    mine = first + step * torch.arange(number, device="cpu")
    places[mine] = torch.arange(number, dtype=torch.int32, device="cpu")
    if not return_expert_mask:
        return number, places, None
    shared = torch.arange(number, number + num_fused_shared_experts, dtype=torch.int32, device="cpu")
    places = torch.cat([places, shared])
    mask = torch.zeros(places.numel() + 1, dtype=torch.int32, device="cpu")
    mask[:-1] = places >= 0
    return number, places, mask
