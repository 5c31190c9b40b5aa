"""Dispatch and combine with exact sizes, by vectorised code on the host."""

from __future__ import annotations

import functools
import itertools

import torch

from tcomm.cpu.moe_high_throughput import (
    Given,
    Head,
    as_words,
    gather,
    read_head,
    return_rows,
    stage,
    sum_rows,
)
from tcomm.cpu.moe_layout import find_holders, find_slots, list_slots
from tcomm.groups.moe.jobs import CombineJob, DispatchJob, Received
from tcomm.groups.moe.routing import Routing
from tcomm.groups.moe.workspace import Workspace
from tcomm.groups.pool import ResultPool
from tcomm.memory.token_regions import DispatchRegions, ReturnRegions

__all__ = ["HostEngine"]


class HostEngine:
    """Does jobs on the host.

    Args:
        workspace: whose memory tokens pass through.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._rank, self._world_size = workspace.rank, workspace.world_size
        self._pool = ResultPool()

    def _take(self, num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """[num_rows, width] with arbitrary contents, in memory that nobody holds any more."""
        step = max(16, 1 << max(0, num_rows.bit_length() - 4))
        room = -(-num_rows // step) * step
        return self._pool.take(torch.Size((room, width)), dtype)[:num_rows]

    def dispatch(self, job: DispatchJob) -> Received:
        """Give and fetch tokens; see `HighThroughput.dispatch`. **Collective.**

        Raises:
            ConfigError, UsageError: see there.
            CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
        """
        workspace = self._workspace
        regions = job.regions(workspace.half_nbytes, self._world_size)
        call = job.call(regions)
        slots, lists = self._list(job)
        given = Given(as_words(job.rows), job.facts, lists, min(job.num_topk, self._world_size))
        first, most, received, starts = 0, 1, None, [0]
        while first < most:
            epoch = workspace.begin(call, job.seconds)
            view = functools.partial(_view, workspace, epoch)
            stage(view, regions, self._rank, epoch, first, given)
            workspace.publish(epoch, call)
            workspace.await_peers(epoch, call)
            heads = [read_head(view, regions, peer, epoch) for peer in range(self._world_size)]
            if received is None:
                received, starts = self._make_room(epoch, job, regions, slots, heads)
                most = max(head.num_tokens for head in heads)
            for source in self._in_turn():
                count = heads[source].rows[self._rank]
                part = slice(starts[source], starts[source] + count)
                out = received.rows[part], received.facts[part], received.routing.row_slots[part]
                gather(view, regions, source, self._rank, first, heads[source], given, out)
                starts[source] += count
            workspace.finish(epoch)
            self._count_fetched(regions, heads)
            first += regions.num_tokens
        assert received is not None
        return received

    def _in_turn(self) -> list[int]:
        """All ranks, the one behind this first, so that not all ask the same one."""
        return [(self._rank + step) % self._world_size for step in range(1, self._world_size + 1)]

    def _list(self, job: DispatchJob) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The places of ranks in each token's order, and the list for each rank."""
        if job.handle is not None:
            slots = job.handle.slots
        else:
            assert job.topk_idx is not None
            slots = find_slots(
                find_holders(job.topk_idx, job.num_experts, self._world_size), self._world_size
            )
        return slots, list_slots(slots, min(job.num_topk, self._world_size))

    def _make_room(
        self, epoch: int, job: DispatchJob, regions: DispatchRegions, slots: torch.Tensor, heads: list[Head]
    ) -> tuple[Received, list[int]]:
        """Room for all that comes, and where the rows of each source begin."""
        counts = [head.totals for head in heads]
        if (refusal := job.find_wrong(regions, counts)) is not None:
            self._workspace.finish(epoch)
            raise refusal
        mine = [row[self._rank] for row in counts]
        num_rows = job.num_worst_tokens or sum(mine)
        matrix = torch.tensor(counts, dtype=torch.int32, device="cpu")
        row_slots = torch.empty(num_rows, dtype=torch.int64, device="cpu")
        facts = torch.empty(num_rows, regions.num_facts, dtype=torch.int32, device="cpu")
        row_slots[sum(mine) :] = -1
        facts[sum(mine) :] = -1
        most = max(head.num_tokens for head in heads)
        routing = Routing(self._rank, slots, row_slots, matrix, counts, most, job.num_topk, job.num_experts)
        rows = self._take(num_rows, job.row_nbytes // 8, torch.int64)
        return Received(rows, facts, routing), [0, *itertools.accumulate(mine)][:-1]

    def _count_fetched(self, regions: DispatchRegions, heads: list[Head]) -> None:
        """Count what came from others: rows with facts and their entries of a list, and heads."""
        num_rows = sum(head.rows[self._rank] for peer, head in enumerate(heads) if peer != self._rank)
        heads_nbytes = 8 * regions.num_head_words * (self._world_size - 1)
        nbytes = num_rows * (regions.row_nbytes + 4 * regions.num_facts + 4) + heads_nbytes
        self._workspace.traffic.wire_nbytes += nbytes

    def combine(self, job: CombineJob) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return rows and add them up; see `HighThroughput.combine`. **Collective.**

        Raises:
            CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
        """
        workspace, routing, regions = self._workspace, job.routing, job.regions(self._workspace.half_nbytes)
        call = job.call(regions)
        num_tokens, num_places = routing.num_tokens, routing.num_places
        out = self._take(num_tokens, job.rows.shape[1], job.rows.dtype)
        weights = None
        if job.topk_weights is not None:
            weights = torch.empty(num_tokens, regions.num_weights, dtype=torch.float32, device="cpu")
        assert routing.most_tokens is not None
        for first in range(0, max(routing.most_tokens, 1), regions.num_tokens):
            epoch = workspace.begin(call, job.seconds)
            self._return(epoch, regions, first, job)
            workspace.publish(epoch, call)
            workspace.await_peers(epoch, call)
            part = slice(first, min(first + regions.num_tokens, num_tokens))
            shape = (max(0, part.stop - first), routing.width)
            terms = [term[part] for term in job.terms]
            rows = workspace.view(self._rank, epoch, 0, (*shape, job.rows.shape[1]), job.rows.dtype)
            sum_rows(rows, num_places[part], terms, out[part])
            if weights is not None:
                offset, shaped = regions.weights_offset, (*shape, regions.num_weights)
                held = workspace.view(self._rank, epoch, offset, shaped, torch.float32)
                sum_rows(held, num_places[part], [], weights[part])
            workspace.finish(epoch)
        return out, weights

    def _return(self, epoch: int, regions: ReturnRegions, first: int, job: CombineJob) -> None:
        """Put this rank's rows where they came from, as far as they belong to one piece."""
        routing, rows = job.routing, as_words(job.rows)
        view = functools.partial(_view, self._workspace, epoch)
        for source in self._in_turn():
            part = routing.rows_of(source)
            weights = None if job.topk_weights is None else job.topk_weights[part]
            count = return_rows(view, regions, source, first, routing.row_slots[part], rows[part], weights)
            if source != self._rank:
                self._workspace.traffic.wire_nbytes += count * (regions.row_nbytes + 4 * regions.num_weights)


def _view(
    workspace: Workspace, epoch: int, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    return workspace.view(rank, epoch, offset, shape, dtype)
