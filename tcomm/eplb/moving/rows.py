"""The weights of a layer as rows of bytes, one row of each for every slot."""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Callable, Sequence

import msgspec
import torch

from tcomm.eplb.migration import Copy, LayerMoves
from tcomm.errors import ConfigError
from tcomm.groups.arguments import check_tensor, dtype_name, is_plain
from tcomm.signature import CallDescription

__all__ = ["LayerRows", "check_layers", "rows_to_give", "write_rows"]

_ALIGNMENT = 16


@dataclasses.dataclass(frozen=True)
class LayerRows:
    """What the weights of a layer look like; those of all layers, and of all ranks, alike."""

    num_slots: int
    """Of a rank."""
    kinds: tuple[str, ...]
    """dtype and shape of a row of each weight, for messages."""
    row_nbytes: tuple[int, ...]
    """Of each weight."""
    device: torch.device
    """Of all of them."""

    @classmethod
    def of(cls, weights: Sequence[torch.Tensor]) -> LayerRows:
        """Those of `weights`.

        Args:
            weights: [P / G, ...] each, dense and contiguous, on one device.

        Raises:
            ConfigError: when they are not that.
        """
        if not isinstance(weights, Sequence) or not weights:
            raise ConfigError(f"the weights of a layer are {weights!r}; give a list of tensors, at least one")
        for number, weight in enumerate(weights):
            check_tensor(f"moving experts, weight {number}:", weight, loses_gradient=False)
            if weight.is_meta:
                raise ConfigError(f"weight {number} of a layer is on the meta device; load it first")
            if not weight.dim() or not is_plain(weight):
                raise ConfigError(
                    f"weight {number} of a layer is {list(weight.shape)} with strides "
                    f"{list(weight.stride())}; needed contiguous [slots of a rank, ...]"
                )
            if len(weight) != len(weights[0]) or weight.device != weights[0].device:
                raise ConfigError(
                    f"weight {number} has {len(weight)} slots on {weight.device}, and weight 0 "
                    f"{len(weights[0])} on {weights[0].device}; a layer's weights have a row for each slot"
                )
        num_slots = len(weights[0])
        if not num_slots:
            raise ConfigError("the weights of a layer have no slots; every rank needs one at least")
        kinds = tuple(f"{dtype_name(weight.dtype)}{list(weight.shape[1:])}" for weight in weights)
        sizes = tuple(weight.numel() // num_slots * weight.itemsize for weight in weights)
        return cls(num_slots, kinds, sizes, weights[0].device)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where the rows of each weight begin in a buffer of `nbytes`."""
        found, at = [], 0
        for nbytes in self.row_nbytes:
            found.append(at)
            at += -(-self.num_slots * nbytes // _ALIGNMENT) * _ALIGNMENT
        return tuple(found)

    @property
    def nbytes(self) -> int:
        """Of a buffer for one layer's weights of a rank."""
        return self.offsets[-1] + self.num_slots * self.row_nbytes[-1]

    def views_of(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """[slots, bytes of a row] uint8 for each weight, in a buffer.

        Args:
            buffer: [nbytes] uint8 or more.
        """
        sizes = zip(self.offsets, self.row_nbytes, strict=True)
        return [
            buffer[at : at + self.num_slots * nbytes].view(self.num_slots, nbytes) for at, nbytes in sizes
        ]

    def bytes_of(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """[slots, bytes of a row] uint8 for each weight, over its own memory.

        Raises:
            ConfigError: when the weights are others than these.
        """
        theirs = LayerRows.of(weights)
        if theirs != self:
            raise ConfigError(f"the weights are {theirs}, and those of the first layer {self}")
        return [
            weight.detach().view(self.num_slots, weight.numel() // self.num_slots).view(torch.uint8)
            for weight in weights
        ]

    def call(self, op: str, layer: int, moves: LayerMoves, algorithm: str) -> CallDescription:
        """What the ranks compare before a layer is moved."""
        digest = zlib.crc32(msgspec.msgpack.encode(moves))
        contents = f"weights {', '.join(self.kinds)} by moves {digest:08x}"
        return CallDescription(
            op, "rows", (layer, self.num_slots), contents=contents, sizes=self.row_nbytes, algorithm=algorithm
        )

    def __str__(self) -> str:
        return f"{', '.join(self.kinds)} in {self.num_slots} slots on {self.device}"


def check_layers(layers: Sequence[Sequence[torch.Tensor]]) -> LayerRows | None:
    """What the weights of each layer look like: all alike, and none in memory of another layer.

    Returns:
        None where there is no layer.

    Raises:
        ConfigError: when they are not that; names the layer.
    """
    rows = [LayerRows.of(weights) for weights in layers]
    for layer, theirs in enumerate(rows):
        if theirs != rows[0]:
            raise ConfigError(f"the weights of layer {layer} are {theirs}, and those of layer 0 {rows[0]}")
    ends = sorted(
        (w.data_ptr(), w.data_ptr() + w.nbytes, n) for n, ws in enumerate(layers) for w in ws if w.nbytes
    )
    for (_, end, layer), (begin, _, other) in itertools.pairwise(ends):
        if begin < end and layer != other:
            raise ConfigError(
                f"layers {min(layer, other)} and {max(layer, other)} share memory of their weights, which "
                "would be moved once for each; give every layer its own"
            )
    return rows[0] if rows else None


def rows_to_give(moves: LayerMoves, rank: int, num_slots: int) -> list[int]:
    """Rows of a rank that somebody needs, itself included, in order."""
    copies = [*moves.local, *(copy for round_ in moves.rounds for copy in round_)]
    return sorted({copy.source % num_slots for copy in copies if copy.source // num_slots == rank})


def write_rows(
    rows: Sequence[torch.Tensor],
    moves: LayerMoves,
    rank: int,
    brought: Callable[[Copy], Sequence[torch.Tensor]],
) -> None:
    """Write what a rank gets into its weights: what was brought, and then its duplicates.

    Args:
        rows: the weights of the layer, from `LayerRows.bytes_of`.
        moves: what the layer needs.
        rank: this one.
        brought: the row of each weight for a copy, round by round and then those within the rank.
    """
    size = len(rows[0])
    # There any tensor may be written, whatever mode it was made in.
    with torch.inference_mode():
        for copy in [*(copy for round_ in moves.rounds for copy in round_), *moves.local]:
            if copy.target // size == rank:
                for row, new in zip(rows, brought(copy), strict=True):
                    row[copy.target % size].copy_(new)
        for copy in moves.duplicates:
            if copy.target // size == rank:
                for row in rows:
                    row[copy.target % size].copy_(row[copy.source % size])
