"""Everybody gets all tokens, and adds up what the experts of all make of his own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tcomm.errors import UsageError
from tcomm.groups.all2all.base import All2AllManagerBase
from tcomm.groups.all2all.forms import read_dispatch
from tcomm.groups.all2all.metadata import current_metadata
from tcomm.groups.all2all.surroundings import Coordinator

__all__ = ["AgRsAll2AllManager"]


class AgRsAll2AllManager(All2AllManagerBase):
    """Dispatch by all-gather, combine by reduce-scatter. No memory of its own, and no limit of tokens.

    Where a TP group's ranks hold different tokens, the EP group exchanges. Else the DP group does; with one
    data parallel rank the PCP group, whose ranks hold as many tokens each; with several of both the EP group,
    which then has no tensor parallel ranks.
    """

    def dispatch(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor | None = None,
        topk_ids: torch.Tensor | bool | None = None,
        is_sequence_parallel: bool | Sequence[torch.Tensor] | None = False,
        extra_tensors: Sequence[torch.Tensor] | None = None,
        *,
        router_logits: torch.Tensor | None = None,
        sizes: Sequence[int] | None = None,
    ) -> tuple[Any, ...]:
        """All ranks' rows of every tensor, in the order of ranks; see the base. **Collective.**

        Args:
            hidden_states: as for the base.
            topk_weights: as for the base.
            topk_ids: as for the base.
            is_sequence_parallel: as for the base.
            extra_tensors: as for the base.
            router_logits: as for the base.
            sizes: as for the base.

        Raises:
            UsageError: when the sizes are not known or do not fit; nothing was sent.
        """
        logits = topk_weights if router_logits is None else router_logits
        given = read_dispatch(hidden_states, logits, topk_ids, is_sequence_parallel, extra_tensors)
        tensors = [*given.tensors, *(given.extras or [])]
        group, lengths = self._exchange(given.is_sequence_parallel, sizes)
        for x in tensors:
            _check_rows(x, tensors[0].shape[0] if lengths is None else lengths[group.rank_in_group], lengths)
        gathered = list(group.all_gatherv(tensors, 0, lengths))
        first = tuple(gathered[: len(given.tensors)])
        return first if given.extras is None else (*first, gathered[len(given.tensors) :])

    def combine(
        self,
        hidden_states: torch.Tensor,
        is_sequence_parallel: bool = False,
        *,
        sizes: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """This rank's rows of the sum over the ranks; see the base. **Collective.**

        Args:
            hidden_states: as for the base.
            is_sequence_parallel: as for the base.
            sizes: as for the base.

        Raises:
            UsageError: when the sizes are not known or do not fit; nothing was sent.
        """
        group, lengths = self._exchange(is_sequence_parallel, sizes)
        return group.reduce_scatterv(hidden_states, 0, lengths)

    def _exchange(
        self, is_sequence_parallel: bool, sizes: Sequence[int] | None
    ) -> tuple[Coordinator, list[int] | None]:
        """The group that exchanges, and the tokens of its ranks; None: as many each."""
        group = self._group_of(is_sequence_parallel)
        metadata = current_metadata()
        if sizes is None and metadata is not None and metadata.local_sizes is not None:
            sizes = metadata.local_sizes
        if sizes is None:
            if is_sequence_parallel or self.dp_world_size > 1:
                raise UsageError(
                    "the ranks' numbers of tokens are not known; give sizes=, or call inside of "
                    "use_metadata() and sp_local_sizes()"
                )
            return group, None
        lengths = list(sizes)
        if len(lengths) != group.world_size:
            raise UsageError(f"sizes={lengths} for {group.world_size} ranks; give one for each")
        return group, lengths

    def _group_of(self, is_sequence_parallel: bool) -> Coordinator:
        if is_sequence_parallel:
            return self._group("ep")
        if self.dp_world_size == 1:
            return self._group("pcp")
        pcp = self._around["pcp"]
        if pcp is None or pcp.world_size == 1:
            return self.dp_group
        if self.tp_group.world_size > 1:
            raise UsageError(
                f"tokens of {self.dp_world_size} DP and {pcp.world_size} PCP ranks are exchanged only where "
                f"nothing is tensor parallel; there are {self.tp_group.world_size} TP ranks"
            )
        return self._group("ep")


def _check_rows(x: torch.Tensor, rows: int, sizes: list[int] | None) -> None:
    if x.dim() == 0 or x.shape[0] != rows:
        raise UsageError(f"a tensor {list(x.shape)} is dispatched with {rows} tokens of this rank ({sizes=})")
