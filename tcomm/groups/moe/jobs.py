"""What a dispatch and a combine are given, and what comes of them, whoever does them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Protocol

import torch

from tcomm.errors import ConfigError, UsageError
from tcomm.groups.arguments import dtype_name
from tcomm.groups.moe.routing import Routing
from tcomm.memory.token_regions import DispatchRegions, ReturnRegions
from tcomm.signature import CallDescription

__all__ = ["CombineJob", "DispatchJob", "Engine", "Received", "Tokens"]

Tokens = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""Rows, or rows and their scales."""


@dataclasses.dataclass(frozen=True)
class DispatchJob:
    """One dispatch of one rank, checked; see `HighThroughput.dispatch`."""

    rows: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    handle: Routing | None
    num_experts: int
    expert_alignment: int
    num_worst_tokens: int
    seconds: float | None

    @property
    def num_topk(self) -> int:
        """Choices a token."""
        if self.topk_idx is None:
            assert self.handle is not None
            return self.handle.num_topk
        return self.topk_idx.shape[1]

    @property
    def facts(self) -> list[torch.Tensor]:
        """What goes with each token's row: ids, weights, scales, as far as they are there."""
        return [each for each in (self.topk_idx, self.topk_weights, self.scales) if each is not None]

    @property
    def row_nbytes(self) -> int:
        """Of a token's row."""
        return self.rows.shape[1] * self.rows.itemsize

    def regions(self, half_nbytes: int, world_size: int) -> DispatchRegions:
        """Where all that lies.

        Raises:
            ConfigError: when not even one token fits.
        """
        num_facts = sum(each.shape[1] for each in self.facts)
        return DispatchRegions(half_nbytes, world_size, self.row_nbytes, num_facts)

    def call(self, regions: DispatchRegions) -> CallDescription:
        """What the ranks must agree on. Nobody agrees with a rank whose tokens do not fit."""
        scales = None if self.scales is None else dtype_name(self.scales.dtype)
        worst = f"at most {self.num_worst_tokens} rows" if self.num_worst_tokens else ""
        if told := _too_many(self._num_at_once, regions.num_tokens):
            worst += f", {told}"
        return _describe_dispatch(
            dtype_name(self.rows.dtype), self.rows.shape[1], scales, self.num_topk, self.num_experts,
            self.topk_weights is not None, 0 if self.handle is None else self.handle.number,
            self.expert_alignment,
            worst,
        )  # fmt: skip

    @property
    def _num_at_once(self) -> int:
        """Tokens that have to go in one piece, since nobody on the host learns how many a peer has."""
        return len(self.rows) if self.num_worst_tokens else 0

    def find_wrong(self, regions: DispatchRegions, counts: list[list[int]] | None) -> ConfigError | None:
        """What is wrong with a dispatch on all ranks, once they agree; they all raise it.

        A `ConfigError` when no rank's tokens fit, or a rank gets more than there is room for, a `UsageError`
        when these are not the rows of the handle.

        Args:
            regions: of the dispatch.
            counts: rows from each rank to each; None where the host does not know.
        """
        if told := _too_many(self._num_at_once, regions.num_tokens):
            return ConfigError(f"{told}; with num_worst_tokens all go at once: enlarge the buffer")
        if counts is None:
            return None
        received = [sum(column) for column in zip(*counts, strict=True)]
        most = max(received)
        if self.num_worst_tokens and most > self.num_worst_tokens:
            return ConfigError(
                f"rank {received.index(most)} gets {most} rows, more than num_worst_tokens="
                f"{self.num_worst_tokens}; give at least as many as can come"
            )
        if self.handle is not None and self.handle.counts not in (None, counts):
            return UsageError(
                f"the ranks gave handles of different dispatches: rows from each rank to each are {counts}, "
                f"and {self.handle.counts} by this one"
            )
        return None


def _too_many(num_tokens: int, room: int) -> str:
    """What is wrong with so many tokens in one piece; empty when nothing is."""
    return f"{num_tokens} tokens of which {room} fit the buffer" if num_tokens > room else ""


@functools.lru_cache(256)
def _describe_dispatch(
    dtype: str,
    hidden: int,
    scales: str | None,
    num_topk: int,
    num_experts: int,
    is_weighted: bool,
    cached: int,
    expert_alignment: int,
    worst: str,
) -> CallDescription:
    contents = [f"top-{num_topk} of {num_experts} experts, aligned to {expert_alignment}"]
    contents += ["weights"] * is_weighted + [f"routes of dispatch #{cached}"] * bool(cached)
    contents += [] if scales is None else [f"scales {scales}"]
    contents += [worst] * bool(worst)
    return CallDescription("dispatch", dtype, (hidden,), contents=", ".join(contents))


@dataclasses.dataclass(frozen=True)
class Received:
    """What a dispatch brought."""

    rows: torch.Tensor
    """[N, row_nbytes / 8] int64."""
    facts: torch.Tensor
    """[N, num_facts] int32."""
    routing: Routing
    """For the way back."""


@dataclasses.dataclass(frozen=True)
class CombineJob:
    """One combine of one rank, checked; see `HighThroughput.combine`."""

    rows: torch.Tensor
    routing: Routing
    topk_weights: torch.Tensor | None
    terms: Sequence[torch.Tensor]
    seconds: float | None

    def regions(self, half_nbytes: int) -> ReturnRegions:
        """Where all that lies.

        Raises:
            ConfigError: when not even one token fits.
        """
        num_weights = 0 if self.topk_weights is None else self.routing.num_topk
        row_nbytes = self.rows.shape[1] * self.rows.itemsize
        return ReturnRegions(half_nbytes, self.routing.width, row_nbytes, num_weights)

    def call(self, regions: ReturnRegions) -> CallDescription:
        """What the ranks must agree on. Nobody agrees with a rank whose tokens do not fit."""
        dtype, hidden = dtype_name(self.rows.dtype), self.rows.shape[1]
        too_many = _too_many(self._num_at_once, regions.num_tokens)
        weighted, number = self.topk_weights is not None, self.routing.number
        return _describe_combine(dtype, hidden, self.routing.num_topk, weighted, number, too_many)

    @property
    def _num_at_once(self) -> int:
        """Tokens whose rows have to come back in one piece, since no host knows how many a peer has."""
        return self.routing.num_tokens if self.routing.most_tokens is None else 0

    def find_wrong(self, regions: ReturnRegions) -> ConfigError | None:
        """What is wrong with a combine on all ranks, once they agree: no rank's tokens fit."""
        if told := _too_many(self._num_at_once, regions.num_tokens):
            return ConfigError(f"{told}; after num_worst_tokens all come back at once: enlarge the buffer")
        return None


@functools.lru_cache(256)
def _describe_combine(
    dtype: str, hidden: int, num_topk: int, is_weighted: bool, number: int, too_many: str
) -> CallDescription:
    contents = [f"top-{num_topk}", *["weights"] * is_weighted, f"rows of dispatch #{number}"]
    contents += [too_many] * bool(too_many)
    return CallDescription("combine", dtype, (hidden,), contents=", ".join(contents))


class Engine(Protocol):
    """Does jobs. All is **collective**."""

    def dispatch(self, job: DispatchJob) -> Received:
        """Give and fetch tokens; see `HighThroughput.dispatch`."""
        ...

    def combine(self, job: CombineJob) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return rows and add them up; see `HighThroughput.combine`."""
        ...
