"""Dispatch and combine with exact sizes, by kernels."""

from __future__ import annotations

import torch

from tcomm.cpu.moe_high_throughput import as_words
from tcomm.groups.moe.jobs import CombineJob, DispatchJob, Received
from tcomm.groups.moe.routing import Routing
from tcomm.groups.moe.workspace import Workspace
from tcomm.kernels.moe_high_throughput import StagedTokens, fetch_heads, gather_rows, stage_tokens
from tcomm.kernels.moe_layout import find_layout
from tcomm.kernels.moe_return import return_rows, sum_places
from tcomm.memory.token_regions import DispatchRegions

__all__ = ["KernelEngine"]


class KernelEngine:
    """Does jobs by kernels: compiled on a GPU, interpreted on a CPU.

    Args:
        workspace: whose memory tokens pass through.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._device = workspace.device
        self._rank, self._world_size = workspace.rank, workspace.world_size

    def dispatch(self, job: DispatchJob) -> Received:
        """Give and fetch tokens; see `HighThroughput.dispatch`. **Collective.**

        The host waits for counts, except with `num_worst_tokens` on a GPU.

        Raises:
            ConfigError, UsageError: see there.
            CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
        """
        workspace, arena = self._workspace, self._workspace.arena
        regions = job.regions(workspace.half_nbytes, self._world_size)
        call = job.call(regions)
        tokens = self._tokens(job)
        fetched = torch.zeros(self._world_size, dtype=torch.int64, device=self._device)
        first, most, received = 0, 1, None
        while first < most:
            workspace.drain()
            epoch = stage_tokens(tokens, arena, call, job.seconds, regions, first)
            heads = fetch_heads(arena, call, job.seconds, epoch, regions)
            if received is None:
                received, refusal = self._make_room(job, tokens, heads, regions)
                most = received.routing.most_tokens or 1
            gather_rows(
                received.rows, received.facts, received.routing.row_slots, heads, fetched, arena, call,
                job.seconds, epoch, regions, tokens.width, first,
            )  # fmt: skip
            workspace.traffic.num_phases += 1
            if refusal is not None:
                raise refusal
            fetched += heads[:, self._world_size + self._rank]
            first += regions.num_tokens
        assert received is not None
        pieces = -(-first // regions.num_tokens)
        self._count(received.routing.counts, regions.row_nbytes + 4 * regions.num_facts + 4, pieces)
        return received

    def _tokens(self, job: DispatchJob) -> StagedTokens:
        if job.handle is not None:
            slots, prefix = job.handle.slots, job.handle.prefix
        else:
            assert job.topk_idx is not None
            found = find_layout(job.topk_idx.contiguous(), job.num_experts, self._world_size)
            slots, prefix = found.slots, found.prefix
        nothing = torch.empty(len(job.rows), 0, dtype=torch.int32, device=self._device)
        return StagedTokens(
            as_words(job.rows),
            nothing.to(torch.int64) if job.topk_idx is None else job.topk_idx.contiguous(),
            nothing if job.topk_weights is None else job.topk_weights.contiguous().view(torch.int32),
            nothing if job.scales is None else job.scales.view(torch.int32),
            slots,
            prefix,
            min(job.num_topk, self._world_size),
        )

    def _make_room(
        self, job: DispatchJob, tokens: StagedTokens, heads: torch.Tensor, regions: DispatchRegions
    ) -> tuple[Received, Exception | None]:
        """Room for all that comes; and what to raise when the call is over, if the counts are wrong."""
        matrix, counts, most = heads[:, : self._world_size].to(torch.int32), None, None
        num_rows = job.num_worst_tokens
        if not num_rows or self._device.type == "cpu":
            table = heads.tolist()
            counts, most = [row[: self._world_size] for row in table], max(row[-1] for row in table)
            num_rows = num_rows or sum(row[self._rank] for row in counts)
        rows = torch.empty(num_rows, job.row_nbytes // 8, dtype=torch.int64, device=self._device)
        facts = torch.full((num_rows, regions.num_facts), -1, dtype=torch.int32, device=self._device)
        row_slots = torch.full((num_rows,), -1, dtype=torch.int64, device=self._device)
        routing = Routing(
            self._rank, tokens.slots, row_slots, matrix, counts, most, job.num_topk, job.num_experts,
            tokens.prefix,
        )  # fmt: skip
        return Received(rows, facts, routing), job.find_wrong(regions, counts)

    def _count(self, counts: list[list[int]] | None, row_nbytes: int, num_pieces: int) -> None:
        """Count rows that came from other ranks, and heads, where the host knows of them."""
        if counts is not None:
            num_rows = sum(row[self._rank] for peer, row in enumerate(counts) if peer != self._rank)
            heads_nbytes = num_pieces * 8 * (2 * self._world_size + 1) * (self._world_size - 1)
            self._workspace.traffic.wire_nbytes += num_rows * row_nbytes + heads_nbytes

    def combine(self, job: CombineJob) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return rows and add them up; see `HighThroughput.combine`. **Collective.**

        Raises:
            CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
        """
        workspace, arena, routing = self._workspace, self._workspace.arena, job.routing
        regions = job.regions(workspace.half_nbytes)
        call = job.call(regions)
        num_tokens, device = routing.num_tokens, self._device
        out = torch.empty(num_tokens, job.rows.shape[1], dtype=job.rows.dtype, device=device)
        weights = torch.empty(num_tokens, regions.num_weights, dtype=torch.float32, device=device)
        given = torch.empty(len(job.rows), 0, dtype=torch.int32, device=device)
        if job.topk_weights is not None:
            given = job.topk_weights.contiguous().view(torch.int32)
        most = regions.num_tokens if routing.most_tokens is None else routing.most_tokens
        terms = [term.contiguous() for term in job.terms]
        for first in range(0, max(most, 1), regions.num_tokens):
            workspace.drain()
            epoch = return_rows(
                as_words(job.rows), routing.row_slots, given, routing.matrix, arena, call, job.seconds,
                regions, first,
            )  # fmt: skip
            sum_places(out, weights, routing.slots, terms, arena, call, job.seconds, epoch, regions, first)
            workspace.traffic.num_phases += 1
        if (refusal := job.find_wrong(regions)) is not None:
            raise refusal
        if routing.counts is not None:
            row_nbytes = regions.row_nbytes + 4 * regions.num_weights
            num_rows = sum(row[self._rank] for peer, row in enumerate(routing.counts) if peer != self._rank)
            workspace.traffic.wire_nbytes += num_rows * row_nbytes
        return out, None if job.topk_weights is None else weights
