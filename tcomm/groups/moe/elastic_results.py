"""Results of an elastic buffer: where they always lie, and whose they are."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from tcomm.errors import UsageError
from tcomm.groups.moe.low_latency import LowLatency
from tcomm.groups.moe.low_latency_calls import LowLatencyHandle, Packed
from tcomm.groups.moe.results import MOST_RESULTS
from tcomm.groups.moe.workspace import Hook
from tcomm.memory.moe_slots import RowFormat, SlotLayout

__all__ = ["ElasticHandle", "KeptResults", "Receive"]


@dataclasses.dataclass(frozen=True)
class ElasticHandle:
    """What combine needs. Unpacks as `(src_info, layout_range, M, H)`, of the most ranks there may be."""

    exchange: LowLatency
    """That the tokens went through."""
    inner: LowLatencyHandle
    """Its own."""
    packed: Packed
    """Where the result lies."""

    def __iter__(self) -> Iterator[Any]:
        layout = self.exchange.layout
        return iter((self.packed.src_info, self.packed.ranges, layout.max_tokens, layout.hidden))


class KeptResults:
    """Memory of results for the most ranks, whichever exchange their tokens go through.

    Args:
        layout: of an exchange of the most ranks.
        device: of the tokens.
    """

    def __init__(self, layout: SlotLayout, device: torch.device) -> None:
        self._packed = [Packed(number, layout, device) for number in range(MOST_RESULTS)]
        self._held: list[weakref.ref[ElasticHandle] | None] = [None] * MOST_RESULTS

    def find_room(self, *exchanges: LowLatency | None) -> Packed:
        """Memory that nobody uses.

        Args:
            exchanges: there are now; results of others are gone.

        Raises:
            UsageError: when two results are alive, of whichever exchange.
        """
        for packed, held in zip(self._packed, self._held, strict=True):
            handle = None if held is None else held()
            is_of_now = handle is not None and any(handle.exchange is one for one in exchanges)
            if handle is None or not is_of_now or not handle.exchange.is_alive(handle.inner):
                return packed
        raise UsageError(
            f"{MOST_RESULTS} results are alive, those inside and outside of mask_remote_ranks() together; "
            "combine one, or drop its handle, before the next dispatch"
        )

    def hold(self, handle: ElasticHandle) -> None:
        """Keep its memory for it, until it is combined or dropped."""
        self._held[handle.packed.number] = weakref.ref(handle)


class Receive:
    """The hook of a dispatch: what came is put where results always are. Calling it again does nothing.

    Args:
        hook: of the exchange.
        handle: of the result.
        form: of its rows.
    """

    def __init__(self, hook: Hook, handle: ElasticHandle, form: RowFormat) -> None:
        self._hook: Hook | None = hook
        self._exchange, self._kept, self._form = handle.exchange, handle.packed, form
        self._inner = weakref.ref(handle.inner)

    def __call__(self) -> None:
        """Receive. **Collective.** A result that was combined meanwhile stays away from the next ones."""
        hook, self._hook, inner = self._hook, None, self._inner()
        if hook is None:
            return
        hook()
        if inner is not None and self._exchange.is_alive(inner):
            self._copy(inner.packed)

    def _copy(self, came: Packed) -> None:
        kept = self._kept
        rows = came.rows_as(self._form)
        kept.rows_as(self._form)[:, : rows.shape[1]] = rows
        if self._form.num_scale_words:
            kept.scales_as(self._form)[:, : rows.shape[1]] = came.scales_as(self._form)
        kept.counts.copy_(came.counts)
        kept.src_info[:, : rows.shape[1]] = came.src_info
        kept.ranges.zero_()
        kept.ranges[:, : came.ranges.shape[1]] = came.ranges
