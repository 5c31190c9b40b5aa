"""What both engines of the choice of slots know: how choices are numbered, and where they are counted."""

from __future__ import annotations

import dataclasses

import torch

__all__ = ["CHOICES_A_BLOCK", "GOLDEN", "SHARE_BITS", "SlotCounter"]

CHOICES_A_BLOCK = 256
"""Choices that are numbered together, exactly. More cost their square; replicas differ by one a block."""
GOLDEN = 40503
"""The odd number nearest to 2**16 over the golden ratio: its multiples spread over 16 bits most evenly."""
SHARE_BITS = 16
"""Of the thresholds of an uneven split."""


@dataclasses.dataclass(frozen=True)
class SlotCounter:
    """Where the choices of a call are counted."""

    load: torch.Tensor
    """[S] int32 or int64; element s counts slot `first_slot + s`. Slots beyond are not counted."""
    first_slot: int
    num_unpadded_tokens: torch.Tensor | int | None
    """Tokens that count, the first ones; None: all."""
    should_record: torch.Tensor | None
    """One bool: whether anything counts; None: it does."""
