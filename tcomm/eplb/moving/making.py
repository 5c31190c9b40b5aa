"""Which mover serves a group, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tcomm.eplb.moving.mover import WeightMover
from tcomm.groups.arguments import UNSET, Timeout, Unset

__all__ = ["make_mover"]


def make_mover(
    group: Any,
    weights: Sequence[torch.Tensor],
    *,
    timeout: Timeout | Unset = UNSET,
    communicator: Any = None,
) -> WeightMover:
    """A mover for the ranks of a group. **Collective.**

    Args:
        group: `GroupCoordinator`, process group or `StatelessProcessGroup`.
        weights: of one layer, on this rank; those of all layers are like them.
        timeout: of waits: seconds, a profile, or None: as long as the peers live.
        communicator: an `EplbCommunicator` to send rows with, in place of shared memory.
    """
    raise NotImplementedError
