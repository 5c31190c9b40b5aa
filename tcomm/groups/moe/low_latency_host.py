"""Low-latency dispatch and combine by vectorised code on the host."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from tcomm.cpu.moe_low_latency import (
    Plan,
    add_weighted,
    as_words,
    find_rows,
    make_plan,
    mark,
    numbers_of,
    pack_ranges,
)
from tcomm.cpu.moe_quantise import quantise
from tcomm.errors import DecodeError
from tcomm.groups.moe.low_latency_calls import CombineJob, DispatchJob
from tcomm.groups.moe.workspace import Workspace
from tcomm.memory.moe_slots import GROUP, LENT_SHIFT, RowFormat, SlotLayout
from tcomm.memory.survivors import Survivors

__all__ = ["HostEngine"]

_BYTES_AT_A_TIME = 1 << 19


@dataclasses.dataclass
class _Routing:
    """What a dispatch left for its combine."""

    plan: Plan
    begins: torch.Tensor | None = None
    """[El, R]: first row of each source, once received."""
    rows: list[torch.Tensor] = dataclasses.field(default_factory=list)
    """For each source, the row of each of its slots, once received."""


class HostEngine:
    """Carries calls out on the host.

    Args:
        workspace: whose halves have `layout`.
        layout: of the exchange.
        lent: the memory of all ranks for results that are not copied: (rank, 0 or 1) to [El, R * M, H].
        survivors: who takes part.
    """

    def __init__(
        self,
        workspace: Workspace,
        layout: SlotLayout,
        lent: Callable[[int, int], torch.Tensor],
        survivors: Survivors,
    ) -> None:
        self._space = workspace
        self._layout = layout
        self._lent = lent
        self._survivors = survivors

    def send_dispatch(self, job: DispatchJob) -> None:
        """Write copies and counts into every owner's half, and publish."""
        layout, space = self._layout, self._space
        plan = make_plan(job.handle.topk_idx, layout.world_size * layout.num_local_experts, layout.world_size)
        job.handle.routing = _Routing(plan)
        rows, scales = quantise_for(job.form, job.x)
        given = as_words(rows)
        self._survivors.refuse_if_masked()
        job.epoch = space.begin(job.call, job.seconds)
        for owner in self._others_first():
            tokens = plan.tokens[plan.starts[owner] : plan.starts[owner + 1]]
            num_copies = len(tokens)
            if num_copies:
                torch.index_select(given, 0, tokens, out=as_words(self._rows(owner, job, num_copies)))
                self._indices(owner, space.rank, job.epoch, num_copies).copy_(tokens)
            if num_copies and scales is not None:
                torch.index_select(scales, 0, tokens, out=self._scales(owner, space.rank, job, num_copies))
            if owner != space.rank:
                space.traffic.wire_nbytes += num_copies * job.form.wire_nbytes
            self._words(owner, job.epoch)[space.rank] = mark(plan.counts[owner], job.epoch)
        self._publish(job)

    def receive_dispatch(self, job: DispatchJob) -> None:
        """Wait for all sources, and pack their copies by expert, source and token."""
        layout, space, packed = self._layout, self._space, job.handle.packed
        began = time.monotonic()
        self._await(job)
        waited = int((time.monotonic() - began) * 1e6)
        counts = self._fresh_numbers(job.epoch, job.call)
        routing = job.handle.routing
        routing.begins, routing.rows = find_rows(counts, layout.capacity)
        rows = as_words(packed.rows_as(job.form).flatten(0, 1))
        scales = packed.scales_as(job.form)
        for source, where in enumerate(routing.rows):
            num_copies = len(where)
            if num_copies:
                rows.index_copy_(0, where, as_words(self._rows(space.rank, job, num_copies, source)))
                indices = self._indices(space.rank, source, job.epoch, num_copies)
                packed.src_info.view(-1).index_copy_(0, where, indices)
            if num_copies and job.form.use_fp8:
                experts, lines = where // layout.capacity, where % layout.capacity
                scales[experts, lines] = self._scales(space.rank, source, job, num_copies)
        packed.ranges.copy_(pack_ranges(routing.begins, counts))
        packed.counts.copy_(counts.sum(0))
        if job.recv_stats is not None:
            job.recv_stats += packed.counts
        if job.wait_stats is not None:
            job.wait_stats[self._survivors.active] += waited
        space.finish(job.epoch)

    def send_combine(self, job: CombineJob) -> None:
        """Write each source's rows into its half, or where they begin in the memory that is lent."""
        layout, space, routing = self._layout, self._space, job.handle.routing
        self._survivors.refuse_if_masked()
        job.epoch = space.begin(job.call, job.seconds)
        assert routing.begins is not None
        y = job.y.contiguous().view(-1, layout.hidden)
        begins = routing.begins.t() | job.handle.packed.number << LENT_SHIFT
        for source in self._others_first():
            where = routing.rows[source]
            if not job.lends and len(where):
                first = space.rank * layout.slots
                given = self._returned(source, job)[first : first + len(where)]
                torch.index_select(as_words(y), 0, where, out=as_words(given))
                if source != space.rank:
                    space.traffic.wire_nbytes += given.nbytes
            self._words(source, job.epoch)[space.rank] = mark(begins[source], job.epoch)
        self._publish(job)

    def receive_combine(self, job: CombineJob) -> None:
        """Wait for all owners, and sum up w * y in the order of the choices."""
        space, plan = self._space, job.handle.routing.plan
        self._await(job)
        numbers = self._fresh_numbers(job.epoch, job.call)
        chosen = self._without_masked(job.topk_idx) >= 0
        sources = self._sources(job, numbers)
        num_tokens = len(job.topk_idx)
        step = max(1, _BYTES_AT_A_TIME // (4 * self._layout.hidden))
        for start in range(0, num_tokens, step):
            part = slice(start, min(start + step, num_tokens))
            acc = torch.zeros(part.stop - part.start, self._layout.hidden, dtype=torch.float32, device="cpu")
            for j in range(job.topk_idx.shape[1]):
                for rows, which, is_there in sources:
                    counts = chosen[part, j] if is_there is None else chosen[part, j] & is_there[part, j]
                    add_weighted(acc, rows, which[part, j], job.weights[part, j], counts)
            job.out[part] = acc
        if job.lends:
            # Who was stopped, and masked, may have read what owners have written since.
            self._survivors.refuse_if_masked()
            row_nbytes = self._layout.hidden * self._layout.itemsize
            away = sum(plan.starts[owner + 1] - plan.starts[owner] for owner in self._survivors.active)
            space.traffic.wire_nbytes += away * row_nbytes
        space.finish(job.epoch)

    def _sources(
        self, job: CombineJob, numbers: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """Where a choice's row is: (rows, [T, k] index of each, [T, k] whether it is among them)."""
        layout, space, plan = self._layout, self._space, job.handle.routing.plan
        if not job.lends:
            mine = plan.owners * layout.slots + plan.slots
            return [(self._returned(space.rank, job), mine, None)]
        first_slots = plan.counts.cumsum(1) - plan.counts
        experts = torch.arange(layout.num_local_experts, device="cpu") * layout.capacity
        found = []
        for owner in self._others_first():
            number = int(numbers[owner, 0]) >> LENT_SHIFT
            begins = numbers[owner] & ((1 << LENT_SHIFT) - 1)
            shift = begins + experts - first_slots[owner]
            local = (job.topk_idx - owner * layout.num_local_experts).clamp(0, layout.num_local_experts - 1)
            rows = self._lent(owner, number).flatten(0, 1)
            found.append((rows, shift[local] + plan.slots, plan.owners == owner))
        return found

    def _fresh_numbers(self, epoch: int, call: object) -> torch.Tensor:
        """[R, El]: what each rank told this one in that epoch."""
        words = self._words(self._space.rank, epoch)
        numbers, are_fresh = numbers_of(words, epoch)
        masked = sorted(self._survivors.masked)
        if masked:
            numbers[masked], are_fresh[masked] = 0, True
        if not are_fresh.all():
            raise DecodeError(
                f"{call} #{epoch} of group {self._space.name!r}: a peer published without its numbers",
                group=self._space.name, seq=epoch, rank=self._space.rank,
            )  # fmt: skip
        return numbers

    def _others_first(self) -> list[int]:
        """Ranks that take part, the next one first and this one last, so that not all begin with the same."""
        ranks = [
            (self._space.rank + step + 1) % self._layout.world_size for step in range(self._layout.world_size)
        ]
        return [rank for rank in ranks if rank not in self._survivors.masked]

    def _without_masked(self, topk_idx: torch.Tensor) -> torch.Tensor:
        """Choices, with none where the owner does not take part."""
        owners = topk_idx // self._layout.num_local_experts
        for rank in self._survivors.masked:
            topk_idx = torch.where(owners == rank, -1, topk_idx)
        return topk_idx

    def _publish(self, job: DispatchJob | CombineJob) -> None:
        if self._survivors.is_needed:
            self._survivors.publish(job.epoch << 32 | job.call.signature)
        else:
            self._space.publish(job.epoch, job.call)

    def _await(self, job: DispatchJob | CombineJob) -> None:
        if self._survivors.is_needed:
            self._space.traffic.num_phases += 1
            self._survivors.await_peers(job.epoch << 32 | job.call.signature, job.seconds)
        else:
            self._space.await_peers(job.epoch, job.call)

    def _words(self, rank: int, epoch: int) -> torch.Tensor:
        shape = (self._layout.world_size, self._layout.num_local_experts)
        return self._space.view(rank, epoch, 0, shape, torch.int64)

    # A source's rows and scales begin at the same byte in every form: late stores of one who is masked, of a
    # call in another form, hit nobody else's.

    def _rows(self, rank: int, job: DispatchJob, num_copies: int, source: int | None = None) -> torch.Tensor:
        layout, source = self._layout, self._space.rank if source is None else source
        shape = (layout.world_size, layout.slots * layout.hidden * layout.itemsize)
        given = self._space.view(rank, job.epoch, layout.rows_offset, shape, torch.uint8)
        rows = given[source, : num_copies * job.form.row_nbytes].view(job.form.wire_dtype)
        return rows.view(num_copies, job.form.hidden)

    def _scales(self, rank: int, source: int, job: DispatchJob, num_copies: int) -> torch.Tensor:
        layout, width = self._layout, job.form.num_scale_words
        shape = (layout.world_size, layout.slots * (layout.hidden // GROUP))
        scales = self._space.view(rank, job.epoch, layout.scales_offset, shape, job.form.scale_dtype)
        return scales[source, : num_copies * width].view(num_copies, width)

    def _indices(self, rank: int, source: int, epoch: int, num_copies: int) -> torch.Tensor:
        layout = self._layout
        shape = (layout.world_size, layout.slots)
        return self._space.view(rank, epoch, layout.indices_offset, shape, torch.int32)[source, :num_copies]

    def _returned(self, rank: int, job: CombineJob) -> torch.Tensor:
        layout = self._layout
        shape = (layout.world_size * layout.slots, layout.hidden)
        return self._space.view(rank, job.epoch, layout.rows_offset, shape, job.y.dtype)


def quantise_for(form: RowFormat, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows as they travel, and their scales if there are any."""
    if not form.use_fp8:
        return x.contiguous(), None
    return quantise(x, round_scale=form.round_scale, use_ue8m0=form.use_ue8m0)
