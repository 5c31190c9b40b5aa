"""The two orders of arguments of a dispatch, and what is the same for all that dispatches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from tcomm.errors import UsageError

__all__ = ["Given", "copy_into", "read_dispatch"]


@dataclasses.dataclass(frozen=True)
class Given:
    """What a dispatch was given, whatever the order of its arguments."""

    tensors: tuple[torch.Tensor, ...]
    """Hidden states and logits, or hidden states, weights and ids."""
    is_sequence_parallel: bool
    """Whether the ranks of a TP group hold different tokens."""
    extras: list[torch.Tensor] | None
    """More tensors with a row for each token; None: none were given, and none are given back."""


def read_dispatch(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor | None,
    topk_ids: torch.Tensor | bool | None,
    is_sequence_parallel: bool | Sequence[torch.Tensor] | None,
    extra_tensors: Sequence[torch.Tensor] | None,
) -> Given:
    """Understand `(hidden, logits, sequence_parallel, extras)` and `(hidden, weights, ids, ...)`.

    Raises:
        UsageError: when there is nothing to dispatch beside the hidden states.
    """
    if not isinstance(router_logits, torch.Tensor):
        raise UsageError(
            f"dispatch takes the router's logits or weights beside the hidden states, not {router_logits!r}"
        )
    if not isinstance(topk_ids, bool):
        by_sequence = bool(is_sequence_parallel)
    else:
        by_sequence = topk_ids
        if not isinstance(is_sequence_parallel, bool):
            extra_tensors = is_sequence_parallel
        elif is_sequence_parallel:
            by_sequence = True
    tensors = (hidden_states, router_logits)
    return Given(
        (*tensors, topk_ids) if isinstance(topk_ids, torch.Tensor) else tensors,
        by_sequence,
        None if extra_tensors is None else list(extra_tensors),
    )


def copy_into(output: torch.Tensor, combined: torch.Tensor) -> torch.Tensor:
    """Write what was combined to memory of the caller.

    Raises:
        UsageError: when `output` has another shape; copying would repeat rows.
    """
    if combined.shape != output.shape:
        raise UsageError(f"output {list(output.shape)} cannot take what is {list(combined.shape)}")
    return output.copy_(combined)
