"""What the calls of low-latency dispatch and combine are made of, whoever carries them out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from tcomm.memory.moe_slots import GROUP, RowFormat, SlotLayout
from tcomm.signature import CallDescription

__all__ = ["CombineJob", "DispatchJob", "Engine", "LowLatencyHandle", "Packed"]


class Packed:
    """Memory of one result, which the next result but one uses again. Its addresses never change.

    Args:
        number: 0 or 1.
        layout: of the exchange.
        device: of the tokens.
    """

    def __init__(self, number: int, layout: SlotLayout, device: torch.device) -> None:
        self.number = number
        self._layout = layout
        experts, capacity = layout.num_local_experts, layout.capacity
        self.rows = torch.empty(
            experts * capacity * layout.hidden * layout.itemsize, dtype=torch.uint8, device=device
        )
        """Bytes of [El, R * M, H], of whatever type a call's rows have."""
        self.scales = torch.empty(
            experts * (layout.hidden // GROUP) * capacity, dtype=torch.int32, device=device
        )
        """Words of [El, num_scale_words, R * M]."""
        self.counts = torch.zeros(experts, dtype=torch.int32, device=device)
        """[El]: valid rows of each expert."""
        self.src_info = torch.zeros(experts, capacity, dtype=torch.int32, device=device)
        """[El, R * M]: token of each row, at its source."""
        self.ranges = torch.zeros(experts, layout.world_size, dtype=torch.int64, device=device)
        """[El, R]: begin << 32 | count of the rows of each source."""

    def rows_as(self, form: RowFormat) -> torch.Tensor:
        """[El, R * M, H] of the type on the wire."""
        shape = (self._layout.num_local_experts, self._layout.capacity, form.hidden)
        return self.rows.view(form.wire_dtype)[: shape[0] * shape[1] * shape[2]].view(shape)

    def scales_as(self, form: RowFormat) -> torch.Tensor:
        """[El, R * M, num_scale_words], with the rows innermost in memory."""
        shape = (self._layout.num_local_experts, form.num_scale_words, self._layout.capacity)
        words = self.scales[: shape[0] * shape[1] * shape[2]].view(form.scale_dtype)
        return words.view(shape).transpose(1, 2)


class LowLatencyHandle:
    """What combine needs of the dispatch before it. Can be indexed like the tuple that DeepEP gives.

    ``(src_info int32 [El, R * M], layout_range int64 [El, R] of begin << 32 | count, M, H, E)``
    """

    def __init__(self, packed: Packed, layout: SlotLayout, topk_idx: torch.Tensor) -> None:
        self.packed = packed
        """Memory of the result."""
        self.topk_idx = topk_idx
        """[T, k] int64: the choices that were sent."""
        self.number = 0
        """Of its dispatch among those of this rank."""
        self.missing: frozenset[int] | None = None
        """Ranks that were left out when it was received, whose rows it lacks; None before."""
        self.routing: Any = None
        """What the engine wrote down for the way back."""
        num_experts = layout.world_size * layout.num_local_experts
        self._fields = (packed.src_info, packed.ranges, layout.max_tokens, layout.hidden, num_experts)

    def __getitem__(self, index: int) -> Any:
        return self._fields[index]

    def __len__(self) -> int:
        return len(self._fields)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._fields)


@dataclasses.dataclass
class DispatchJob:
    """One dispatch."""

    x: torch.Tensor
    """[T, H]."""
    form: RowFormat
    """Of the copies."""
    handle: LowLatencyHandle
    """Where its result lies; the engine adds its routing."""
    call: CallDescription
    """What the ranks compare."""
    seconds: float | None
    """That its wait may take."""
    recv_stats: torch.Tensor | None
    """[El] int32: counts are added."""
    wait_stats: torch.Tensor | None
    """[R] int64: microseconds that were waited for each source are added."""
    epoch: int = 0
    """Once it was begun."""
    host_epoch: int = 0
    """Of the words by which the hosts agree, where those are not the ones by which kernels wait."""


@dataclasses.dataclass
class CombineJob:
    """One combine."""

    y: torch.Tensor
    """[El, R * M, H], what the experts made."""
    topk_idx: torch.Tensor
    """[T, k] int64: which choices count."""
    weights: torch.Tensor
    """[T, k] float32."""
    handle: LowLatencyHandle
    """Of the dispatch."""
    lends: bool
    """Whether y lies where all ranks can read it."""
    out: torch.Tensor
    """[T, H], the result."""
    call: CallDescription
    """What the ranks compare."""
    seconds: float | None
    """That its wait may take."""
    epoch: int = 0
    """Once it was begun."""
    host_epoch: int = 0
    """Of the words by which the hosts agree, where those are not the ones by which kernels wait."""


class Engine(Protocol):
    """Carries calls out, each in two parts. Inside of `Workspace.run`."""

    def send_dispatch(self, job: DispatchJob) -> None:
        """Begin an epoch, put copies into the slots of their owners, and publish."""
        ...

    def receive_dispatch(self, job: DispatchJob) -> None:
        """Wait for all sources, and pack what they gave."""
        ...

    def send_combine(self, job: CombineJob) -> None:
        """Begin an epoch, give each source its rows back, and publish."""
        ...

    def receive_combine(self, job: CombineJob) -> None:
        """Wait for all owners, and sum up what they gave."""
        ...
