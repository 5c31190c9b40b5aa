"""What moves the weights of a layer: in two steps, so that a death in the middle leaves no layer half new."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from tcomm.eplb.migration import LayerMoves

__all__ = ["WeightMover"]


@runtime_checkable
class WeightMover(Protocol):
    """Moves weights between the ranks of one group, layer after layer. Protocol: `docs/eplb/moving.md`.

    Every rank prepares the same layers in one order and commits each before it prepares the next. A layer
    without moves needs neither. `prepare` may run in another thread than `commit`, and weights may be read
    meanwhile, though not written.

    The weights of a layer are tensors of [P / G, ...], contiguous, of any dtypes and row sizes; those of all
    layers and ranks alike.
    """

    def prepare(self, layer: int, moves: LayerMoves, weights: Sequence[torch.Tensor]) -> None:
        """Bring all that this rank needs to where no peer's death can take it. **Collective.**

        Returns on every rank that lives, or raises on every one: the verdict is one. No weight is changed,
        and none may be until `commit`.

        Args:
            layer: number of the layer, for errors; the same on every rank.
            moves: what the layer needs, likewise.
            weights: of the layer, on this rank.

        Raises:
            ConfigError: when the weights are not of the kind that the mover is for. Nobody waits for long.
            CollectiveMismatchError: when the ranks are to move different things.
            PeerLostError, PeerTimeoutError: when a peer is dead or late; names it. The mover cannot be used
                any more, and no rank's weights of this layer change.
        """

    def commit(self, layer: int, moves: LayerMoves, weights: Sequence[torch.Tensor]) -> None:
        """Write the rows that `prepare` brought into the weights. Local; waits for nobody.

        Args:
            layer: as for `prepare`.
            moves: as for `prepare`.
            weights: as for `prepare`; rows that get no other expert are not touched.

        Raises:
            UsageError: when another layer was prepared, or none.
        """

    def settle(self, is_agreed: bool) -> bool:
        """Whether to commit what was prepared: of all ranks' words the first counts. Waits for nobody.

        For ranks that agree on the time of a commit by something that may fail on some of them alone.

        Args:
            is_agreed: whether this rank has heard that all are to commit now.

        Raises:
            UsageError: when no layer was prepared.
        """

    def reserve(self, weights: Sequence[torch.Tensor]) -> None:
        """Touch the memory that moving a layer takes, and move nothing. **Collective.**

        Raises:
            ConfigError, CommError: as `prepare` does.
        """

    def close(self) -> None:
        """Give the memory back. Not collective; may be called twice."""
