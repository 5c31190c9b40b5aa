"""Checks of a router's choices that all exchanges of tokens have in common."""

from __future__ import annotations

import torch

from tcomm.errors import ConfigError

__all__ = ["MOST_ROWS", "check_divides", "check_expert_ids"]

MOST_ROWS = 1 << 31
"""Experts and rows are numbered by 32 bits: there are fewer than so many."""


def check_divides(num_experts: int, world_size: int) -> None:
    """Check that every rank holds as many experts, at least one.

    Raises:
        ConfigError: when they do not divide.
    """
    if type(num_experts) is not int or not 0 < num_experts < MOST_ROWS or num_experts % world_size:
        raise ConfigError(
            f"num_experts={num_experts!r} do not divide among {world_size} ranks; give a multiple of that"
        )


def check_expert_ids(topk_idx: torch.Tensor, num_experts: int) -> None:
    """Check that all experts are there. Looks at the values, so a GPU is waited for.

    Args:
        topk_idx: [T, k] integers; -1: none.
        num_experts: of all ranks.

    Raises:
        ConfigError: when one is not; names its token.
    """
    if topk_idx.numel() == 0:
        return
    least, most = torch.aminmax(topk_idx)
    if int(least) >= -1 and int(most) < num_experts:
        return
    token, entry = ((topk_idx < -1) | (topk_idx >= num_experts)).nonzero()[0].tolist()
    raise ConfigError(
        f"token {token} has expert {int(topk_idx[token, entry])} at entry {entry}; "
        f"experts are 0 to {num_experts - 1}, or -1 for none"
    )
