"""Loads over the last steps: what was counted in slots, told of experts."""

from __future__ import annotations

import torch

__all__ = ["new_window", "of_experts"]


def new_window(size: int, load_pass: torch.Tensor) -> torch.Tensor:
    """Room for the loads of `size` steps, zero.

    Args:
        size: steps.
        load_pass: [L, N], the load of one.

    Returns:
        [size, L, N] of the same dtype and device.
    """
    with torch.inference_mode(False):
        return torch.zeros((size, *load_pass.shape), dtype=load_pass.dtype, device=load_pass.device)


def of_experts(window: torch.Tensor, slots: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Tokens of each expert, over the steps of a window.

    Args:
        window: [steps, L, N], tokens of N slots.
        slots: [L, N], the expert in each; -1 for none.
        num_experts: E.

    Returns:
        [L, E] int64 in host memory.
    """
    load = window.sum(dim=0, dtype=torch.int64)
    shape = (load.shape[0], num_experts + 1)
    total = torch.zeros(shape, dtype=torch.int64, device=load.device).scatter_add_(1, slots + 1, load)
    return total[:, 1:].cpu()
