"""Tokens by one broadcast from each rank: the plainest exchange, to compare others with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from tcomm.errors import NotOfferedError, UsageError
from tcomm.groups.all2all.base import All2AllManagerBase
from tcomm.groups.all2all.forms import read_dispatch
from tcomm.groups.all2all.metadata import current_metadata

__all__ = ["NaiveAll2AllManager"]


class NaiveAll2AllManager(All2AllManagerBase):
    """Dispatch by broadcasts, combine by an all-reduce. No memory of its own, and no limit of tokens.

    The EP group exchanges where a TP group's ranks hold different tokens, else the DP group. The sum is over
    the whole EP group in either case: a layer does not add over its TP group once more.
    """

    def naive_multicast(
        self, x: torch.Tensor, cu_tokens_across_sp_cpu: torch.Tensor, is_sequence_parallel: bool
    ) -> torch.Tensor:
        """All ranks' rows, one broadcast for each rank. **Collective.**

        Args:
            x: [T, c].
            cu_tokens_across_sp_cpu: integers: tokens up to and with each rank.
            is_sequence_parallel: whether the EP group exchanges, or the DP group.

        Returns:
            [sum of tokens, c].

        Raises:
            UsageError: when x has not two dimensions, or other rows than its counts say; nothing was sent.
        """
        group = self._group("ep") if is_sequence_parallel else self.dp_group
        ends = [int(end) for end in cu_tokens_across_sp_cpu]
        blocks = list(itertools.pairwise([0, *ends]))
        if x.dim() != 2 or len(blocks) != group.world_size:
            raise UsageError(f"{list(x.shape)} over {len(blocks)} ranks; give [T, c] and {group.world_size}")
        first, last = blocks[group.rank_in_group]
        if x.shape[0] != last - first:
            raise UsageError(f"{list(x.shape)} where this rank's tokens are {last - first}")
        everything = x.new_empty((ends[-1], x.shape[1]))
        everything[first:last] = x
        for rank, (begin, end) in enumerate(blocks):
            if end > begin:
                group.broadcast(everything[begin:end], rank)
        return everything

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
            extra_tensors: none.
            router_logits: as for the base.
            sizes: as for the base.

        Raises:
            NotOfferedError: a `NotImplementedError`; when there are extra tensors.
            UsageError: when the sizes are not known or do not fit; nothing was sent.
        """
        logits = topk_weights if router_logits is None else router_logits
        given = read_dispatch(hidden_states, logits, topk_ids, is_sequence_parallel, extra_tensors)
        if given.extras is not None:
            raise NotOfferedError("extra_tensors is not supported for NaiveAll2AllManager")
        ends = self._ends(given.is_sequence_parallel, sizes)
        if any(x.dim() != 2 or x.shape[0] != hidden_states.shape[0] for x in given.tensors):
            raise UsageError(f"{[list(x.shape) for x in given.tensors]} are not rows of the same tokens")
        return tuple(self.naive_multicast(x, ends, given.is_sequence_parallel) for x in given.tensors)

    def combine(
        self,
        hidden_states: torch.Tensor,
        is_sequence_parallel: bool = False,
        *,
        sizes: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """This rank's rows of the sum over the EP group; see the base. **Collective.**

        Args:
            hidden_states: as for the base.
            is_sequence_parallel: as for the base.
            sizes: as for the base.

        Raises:
            UsageError: when the sizes are not known or do not fit; nothing was sent.
        """
        ends = [0, *self._ends(is_sequence_parallel, sizes).tolist()]
        if hidden_states.dim() == 0 or hidden_states.shape[0] != ends[-1]:
            raise UsageError(f"{list(hidden_states.shape)} where all ranks' tokens are {ends[-1]}")
        total = self._group("ep").all_reduce(hidden_states)
        rank = (self._group("ep") if is_sequence_parallel else self.dp_group).rank_in_group
        return total[ends[rank] : ends[rank + 1]]

    def _ends(self, is_sequence_parallel: bool, sizes: Sequence[int] | None) -> torch.Tensor:
        """Tokens up to and with each rank that exchanges."""
        metadata = current_metadata()
        if sizes is None and metadata is not None:
            if metadata.local_sizes is None:
                shares = self.tp_group.world_size if is_sequence_parallel else 1
                return metadata.cu_tokens_across_sp(shares)
            sizes = metadata.local_sizes
        if sizes is None:
            raise UsageError(
                "the ranks' numbers of tokens are not known; give sizes=, or call inside of use_metadata()"
            )
        group = self._group("ep") if is_sequence_parallel else self.dp_group
        if len(sizes) != group.world_size:
            raise UsageError(f"sizes={list(sizes)} for {group.world_size} ranks; give one for each")
        return torch.tensor(list(sizes), dtype=torch.int64, device="cpu").cumsum(0)
