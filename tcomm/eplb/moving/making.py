"""Which mover serves a group, and why."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from tcomm.eplb.moving.communicator import EplbCommunicator
from tcomm.eplb.moving.groups import ExpertGroup, members_that_move
from tcomm.eplb.moving.mover import WeightMover
from tcomm.eplb.moving.rows import LayerRows
from tcomm.eplb.moving.symmetric import SymmetricMover
from tcomm.groups.arguments import UNSET, Timeout, Unset

__all__ = ["make_mover"]

logger = logging.getLogger("tcomm")


def make_mover(
    group: ExpertGroup,
    weights: Sequence[torch.Tensor],
    *,
    timeout: Timeout | Unset = UNSET,
    communicator: EplbCommunicator | None = None,
) -> WeightMover:
    """A mover for the ranks of a group; the log says which one, and why. **Collective.**

    Args:
        group: `GroupCoordinator`, process group or `StatelessProcessGroup`.
        weights: of one layer, on this rank; those of all layers are like them.
        timeout: of waits: seconds, a profile, or None: as long as the peers live.
        communicator: what to send rows with, in place of shared memory.

    Raises:
        ConfigError: when an argument is wrong; nobody is waited for.
        CapabilityError: on every rank, when nothing can move such weights in this group.
        GroupMismatchError: on every rank, when their weights differ.
        RendezvousError: when a rank did not come in time.
    """
    LayerRows.of(weights)
    members = members_that_move(group)
    mover = SymmetricMover(members, weights, timeout=timeout)
    logger.info("group %r moves experts through memory that its ranks share", members.name)
    return mover
