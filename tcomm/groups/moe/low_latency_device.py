"""Low-latency dispatch and combine by kernels."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

import torch

from tcomm.errors import CollectiveMismatchError
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
        survivors: who takes part.
    """

    def __init__(
        self,
        workspace: Workspace,
        layout: SlotLayout,
        lent: Callable[[], Staging],
        survivors: Survivors,
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
        with self._telling(job):
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
        agreed = time.monotonic()
        receive_copies(
            space.arena, job.call, job.seconds, job.epoch, self._layout, job.form,
            packed.rows.view(torch.int32), packed.scales, packed.src_info, packed.ranges, packed.counts,
            job.recv_stats, job.wait_stats,
        )  # fmt: skip
        # Interpreted kernels have no clock, and others none of what the host waits.
        on_host = space.device.type == "cpu"
        if job.wait_stats is not None and (on_host or job.host_epoch):
            waited = int(((time.monotonic() if on_host else agreed) - began) * 1e6)
            job.wait_stats[self._survivors.active] += waited

    def send_combine(self, job: CombineJob) -> None:
        """Push each source's rows, or say where they begin."""
        packed = job.handle.packed
        with self._telling(job):
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
            # Who was stopped, and masked, may have read what owners have written since.
            self._survivors.refuse_if_masked()
            self._count(routing.by_rank(self._layout), self._row_nbytes)

    @property
    def _row_nbytes(self) -> int:
        """Of a row on its way back."""
        return self._layout.hidden * self._layout.itemsize

    @contextlib.contextmanager
    def _telling(self, job: DispatchJob | CombineJob) -> Iterator[None]:
        """Around the launch that publishes: where late ranks are masked, this host tells the others of it."""
        space, survivors = self._space, self._survivors
        survivors.refuse_if_masked()
        agrees = self._is_apart and survivors.masks_late
        if self._is_apart and not agrees:
            # Kernels that wait in vain give the group up, for all.
            survivors.refuse_if_left_out()
        if agrees:
            # What is known of earlier calls is raised before this one begins.
            space.synchronize()
        yield
        if agrees:
            # All that this rank gives is in everybody's memory once its kernel has ended.
            space.synchronize()
            job.host_epoch = space.host_arena.channel.begin(job.call, job.seconds)
            survivors.publish(job.host_epoch << 32 | job.call.signature)

    def _agree(self, job: DispatchJob | CombineJob) -> None:
        """Let the host wait, where it can leave ranks out: it has the verdict, and the kernel obeys.

        Afterwards all that the kernel waits for is there. On a device the host need not wait for masks that
        were set by hand: kernels see them.
        """
        survivors, signature = self._survivors, job.call.signature
        if not self._is_apart and survivors.is_needed:
            survivors.await_peers(job.epoch << 32 | signature, job.seconds)
        elif job.host_epoch:
            # Calls that differ are found by the kernel too, which comes to the end of its epoch by it.
            with contextlib.suppress(CollectiveMismatchError):
                survivors.await_peers(job.host_epoch << 32 | signature, job.seconds)
                self._space.host_arena.channel.finish(job.host_epoch)

    @property
    def _is_apart(self) -> bool:
        """Whether kernels wait by other words than the host."""
        return self._space.arena is not self._space.host_arena

    def _count(self, rows_by_rank: torch.Tensor, row_nbytes: int) -> None:
        """Count rows to or from other ranks, where the host need not wait for them."""
        if self._space.device.type == "cpu":
            num_rows = int(rows_by_rank[self._survivors.active].sum())
            self._space.traffic.wire_nbytes += num_rows * row_nbytes
