"""What sends the rows of experts between ranks that share no memory."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch

__all__ = ["EplbCommunicator"]


class EplbCommunicator(abc.ABC):
    """Collects sends and receives, and does them together. One thread at a time."""

    @abc.abstractmethod
    def add_send(self, tensors: Sequence[torch.Tensor], dst_rank: int, expert_id: int) -> None:
        """Note that the rows of an expert are to be sent.

        Args:
            tensors: a row of each weight, not written until `execute` has returned.
            dst_rank: receiver, in the group.
            expert_id: whose rows.
        """

    @abc.abstractmethod
    def add_recv(self, tensors: Sequence[torch.Tensor], src_rank: int, expert_id: int) -> None:
        """Note that the rows of an expert are to be received.

        Args:
            tensors: where to, a row of each weight.
            src_rank: sender, in the group.
            expert_id: whose rows.
        """

    @abc.abstractmethod
    def execute(self) -> None:
        """Do all that was noted, and forget it. Every rank calls it.

        Raises:
            PeerLostError, PeerTimeoutError: when a peer is dead or late; names it.
        """
