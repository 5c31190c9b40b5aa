"""Which mover serves a group, and why."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from tcomm.eplb.moving.communicator import EplbCommunicator
from tcomm.eplb.moving.creation import create_eplb_communicator, seconds_of
from tcomm.eplb.moving.groups import ExpertGroup, members_that_move
from tcomm.eplb.moving.messages import MessageMover
from tcomm.eplb.moving.mover import WeightMover
from tcomm.eplb.moving.rows import LayerRows
from tcomm.eplb.moving.symmetric import SymmetricMover
from tcomm.errors import CapabilityError, ConfigError
from tcomm.groups.arguments import UNSET, Timeout, Unset
from tcomm.groups.setup import Membership

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
    rows = LayerRows.of(weights)
    members = members_that_move(group)
    reason = "the caller gave a communicator"
    if communicator is None:
        made = _symmetric(members, weights, rows.device, timeout)
        if not isinstance(made, str):
            logger.info("group %r moves experts through memory that its ranks share", members.name)
            return made
        reason = made
        try:
            communicator = create_eplb_communicator(group, None, weights, timeout=timeout)
        except (CapabilityError, ConfigError) as error:
            raise CapabilityError(
                f"nothing moves experts in group {members.name!r}: {reason}; {error}"
            ) from None
    how = type(communicator).__name__
    logger.info("group %r moves experts by messages of %s: %s", members.name, how, reason)
    return MessageMover(members, weights, communicator, seconds_of(timeout))


def _symmetric(
    members: Membership, weights: Sequence[torch.Tensor], device: torch.device, timeout: Timeout | Unset
) -> SymmetricMover | str:
    """What moves in shared memory, or why nothing can; the same on every rank."""
    if device.type not in {"cpu", "cuda"}:
        return f"ranks share no memory on {device.type}"
    try:
        return SymmetricMover(members, weights, timeout=timeout)
    except CapabilityError as error:
        return str(error)
