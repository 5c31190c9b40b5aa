"""Low-latency dispatch and combine by kernels."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from tcomm.groups.moe.low_latency_calls import CombineJob, DispatchJob
from tcomm.groups.moe.workspace import Workspace
from tcomm.kernels.moe_low_latency import receive_copies, send_copies
from tcomm.kernels.moe_low_latency_combine import send_rows, sum_rows
from tcomm.memory.base import Staging
from tcomm.memory.moe_slots import SlotLayout
from tcomm.memory.survivors import Survivors

__all__ = ["KernelEngine"]

_COUNT_MASK = (1 << 32) - 1


@dataclasses.dataclass(frozen=True)
class _Routing:
    """What a dispatch left for its combine, on the device."""

    slots: torch.Tensor
    """[T, k] int32."""
    counts: torch.Tensor
    """[E] int32."""

    def by_rank(self, layout: SlotLayout) -> torch.Tensor:
        """[R]: copies for each rank."""
        return self.counts.view(-1, layout.num_local_experts).sum(1)


class KernelEngine:
    """Carries calls out by kernels. What they move on a GPU, the host does not count.

    Args:
        workspace: whose halves have `layout`.
        layout: of the exchange.
        lent: the memory of all ranks for results that are not copied.
        survivors: who takes part; None on a GPU, where all do.
    """

    def __init__(
        self,
        workspace: Workspace,
        layout: SlotLayout,
        lent: Callable[[], Staging],
        survivors: Survivors | None,
    ) -> None:
        self._space = workspace
        self._layout = layout
        self._lent = lent
        self._survivors = survivors

    def send_dispatch(self, job: DispatchJob) -> None:
        """Number the copies, push them, and publish."""
        topk_idx, layout = job.handle.topk_idx.contiguous(), self._layout
        routing = _Routing(
            torch.empty_like(topk_idx, dtype=torch.int32),
            torch.empty(
                layout.world_size * layout.num_local_experts, dtype=torch.int32, device=topk_idx.device
            ),
        )
        job.handle.routing = routing
        self._refuse_if_masked()
        job.epoch = send_copies(
            self._space.arena, job.call, job.seconds, layout, job.form, job.x.contiguous(), topk_idx,
            routing.slots, routing.counts,
        )  # fmt: skip
        self._count(routing.by_rank(layout), job.form.wire_nbytes)

    def receive_dispatch(self, job: DispatchJob) -> None:
        """Wait for all sources, and pack their copies."""
        packed, space = job.handle.packed, self._space
        space.traffic.num_phases += 1
        began = time.monotonic()
        self._agree(job)
        receive_copies(
            space.arena, job.call, job.seconds, job.epoch, self._layout, job.form,
            packed.rows.view(torch.int32), packed.scales, packed.src_info, packed.ranges, packed.counts,
            job.recv_stats, job.wait_stats,
        )  # fmt: skip
        if job.wait_stats is not None and space.device.type == "cpu":
            # Interpreted kernels have no clock.
            waited = int((time.monotonic() - began) * 1e6)
            job.wait_stats += (torch.arange(space.world_size, device="cpu") != space.rank) * waited

    def send_combine(self, job: CombineJob) -> None:
        """Push each source's rows, or say where they begin."""
        packed = job.handle.packed
        self._refuse_if_masked()
        job.epoch = send_rows(
            self._space.arena, job.call, job.seconds, self._layout, job.y.contiguous(), packed.ranges,
            packed.number, job.lends,
        )  # fmt: skip
        if not job.lends:
            self._count((packed.ranges & _COUNT_MASK).sum(0), self._row_nbytes)

    def receive_combine(self, job: CombineJob) -> None:
        """Wait for all owners, and sum up."""
        routing = job.handle.routing
        self._space.traffic.num_phases += 1
        self._agree(job)
        sum_rows(
            self._space.arena, job.call, job.seconds, job.epoch, self._layout, job.out,
            job.topk_idx.contiguous(), job.weights.contiguous(), routing.slots, routing.counts,
            self._lent() if job.lends else None,
        )  # fmt: skip
        if job.lends:
            self._count(routing.by_rank(self._layout), self._row_nbytes)

    @property
    def _row_nbytes(self) -> int:
        """Of a row on its way back."""
        return self._layout.hidden * self._layout.itemsize

    def _refuse_if_masked(self) -> None:
        if self._survivors is not None:
            self._survivors.refuse_if_masked()

    def _agree(self, job: DispatchJob | CombineJob) -> None:
        """Let the host wait, where ranks may be left out: it has the verdict, and the kernel obeys.

        Afterwards all that the kernel waits for is there.
        """
        survivors = self._survivors
        if survivors is not None and survivors.is_needed:
            survivors.await_peers(job.epoch << 32 | job.call.signature, job.seconds)

    def _count(self, rows_by_rank: torch.Tensor, row_nbytes: int) -> None:
        """Count rows to or from other ranks, where the host need not wait for them."""
        if self._survivors is not None:
            num_rows = int(rows_by_rank[self._survivors.active].sum())
            self._space.traffic.wire_nbytes += num_rows * row_nbytes
