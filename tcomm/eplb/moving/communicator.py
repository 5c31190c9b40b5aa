"""What sends the rows of experts between ranks that share no memory."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch

__all__ = ["EplbCommunicator"]


class EplbCommunicator(abc.ABC):
    """Collects sends and receives, and does them together. One thread at a time."""

    needs_profile_buffer_reservation = True
    """Whether it takes memory when it is first used, which profiling should see."""

    @abc.abstractmethod
    def add_send(self, tensors: Sequence[torch.Tensor], dst_rank: int, expert_id: int) -> None:
        """Note that the rows of an expert are to be sent.

        Args:
            tensors: a row of each weight, contiguous; not written until `execute` has returned.
            dst_rank: receiver, in the group.
            expert_id: whose rows.
        """

    @abc.abstractmethod
    def add_recv(self, tensors: Sequence[torch.Tensor], src_rank: int, expert_id: int) -> None:
        """Note that the rows of an expert are to be received.

        Args:
            tensors: where to, a row of each weight, contiguous.
            src_rank: sender, in the group.
            expert_id: whose rows.
        """

    @abc.abstractmethod
    def execute(self) -> None:
        """Do all that was noted, and forget it. Every rank calls it, with as much for each pair of ranks.

        Raises:
            PeerLostError, PeerTimeoutError: when a peer is dead or late; names it. Not to be used again then.
        """

    def set_transfer_context(self, old_indices: object, layer_idx: int) -> None:  # noqa: B027
        """Told before the sends of a layer. Nothing to do, unless a communicator says so.

        Args:
            old_indices: [P], the map in force; None where only the moves are known.
            layer_idx: number of the layer.
        """

    def set_stream(self, stream: torch.cuda.Stream | None) -> None:  # noqa: B027
        """Told on which stream the rows are written and read. Nothing to do where that is the current one.

        Args:
            stream: None: the current one.
        """
