"""Dispatch and combine of fixed capacity, one copy per (token, expert), for few tokens. See its document.

`docs/moe/low_latency.md` has the protocol, its layouts and what is promised.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable

import torch

from tcomm.errors import ConfigError, UsageError
from tcomm.groups.arguments import UNSET, Timeout, Unset, dtype_name
from tcomm.groups.moe.low_latency_calls import CombineJob, DispatchJob, Engine, LowLatencyHandle, Packed
from tcomm.groups.moe.low_latency_checks import (
    check_combine,
    check_dispatch,
    check_sizes_of_exchange,
    check_statistics,
)
from tcomm.groups.moe.low_latency_device import KernelEngine
from tcomm.groups.moe.low_latency_host import HostEngine
from tcomm.groups.moe.low_latency_masks import Masks
from tcomm.groups.moe.results import MOST_RESULTS, Results
from tcomm.groups.moe.workspace import Hook, Workspace
from tcomm.groups.setup import Membership, split_exchange, split_membership
from tcomm.memory.base import Staging
from tcomm.memory.moe_slots import RowFormat, SlotLayout
from tcomm.signature import CallDescription

__all__ = ["LowLatency", "size_hint"]

_ALIGNMENT = 128

Received = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def size_hint(num_max_tokens: int, hidden: int, world_size: int, num_experts: int) -> int:
    """Bytes that DeepEP's low-latency buffer would take, for code that asks. tcomm needs other numbers.

    Args:
        num_max_tokens: of a rank in one call.
        hidden: channels.
        world_size: of no influence.
        num_experts: of all ranks.
    """
    del world_size
    scales = 4 * (hidden // 128)
    dispatched = 16 + max(2 * hidden, hidden + scales)
    combined = 2 * hidden + scales
    send = max(num_max_tokens * dispatched, num_experts * num_max_tokens * combined)
    receive = num_experts * num_max_tokens * max(dispatched, combined)
    signals = math.ceil(4 * num_experts / _ALIGNMENT) * _ALIGNMENT
    return (2 * (send + receive + signals) // _ALIGNMENT + 1) * _ALIGNMENT


class LowLatency:
    """Exchanges tokens with the owners of their experts, by slots of fixed capacity. **Collective** to make.

    Expert e lives on rank e // (E / R). Results lie in memory of this object: at most two are alive, from
    their dispatch until they are combined or their handle is dropped.

    Args:
        members: who takes part.
        num_max_tokens: M, tokens that a rank gives in one call, at most.
        hidden: H, channels of a token, a multiple of 8.
        num_experts: E, a multiple of the ranks.
        max_topk: experts of a token, at most.
        dtype: of tokens and of what experts give back: bfloat16, float16 or float32.
        timeout: of waits: seconds, a profile, or None: as long as the peers live.
        device: of the tokens.
        engine: `cpu`, `triton`, or empty: what suits the device.

    Raises:
        ConfigError: when a size makes no sense.
        CapabilityError, RendezvousError, GroupMismatchError: as `Workspace` does.
    """

    def __init__(
        self,
        members: Membership,
        num_max_tokens: int,
        hidden: int,
        num_experts: int,
        *,
        max_topk: int = 11,
        dtype: torch.dtype = torch.bfloat16,
        timeout: Timeout | Unset = UNSET,
        device: torch.device | str = "cpu",
        engine: str = "",
    ) -> None:
        world_size = members.exchange.world_size
        check_sizes_of_exchange(num_max_tokens, hidden, num_experts, max_topk, dtype, world_size)
        self.num_experts = num_experts
        self.dtype = dtype
        self.layout = SlotLayout(
            world_size, num_experts // world_size, num_max_tokens, max_topk, hidden, dtype.itemsize
        )
        mask_exchange = split_exchange(members, "masks")
        self._combine_members = split_membership(members, "combine")
        self.workspace = Workspace(
            members, self.layout.half_nbytes, timeout=timeout, device=device, engine=engine
        )
        self._combine_space: Workspace | None = None
        self._results = Results(f"low-latency exchange {members.name!r}")
        self._num_dispatched = 0
        memory = range(MOST_RESULTS)
        self._packed = [Packed(number, self.layout, self.workspace.device) for number in memory]
        self._in_memory: list[weakref.ref[LowLatencyHandle] | None] = [None] * MOST_RESULTS
        self._engine: Engine
        self.masks = Masks(self.workspace, mask_exchange, self._results)
        """Which ranks the exchange goes on without; see `docs/moe/elastic.md`."""
        survivors = self.masks.survivors
        if self.workspace.engine == "cpu":
            self._engine = HostEngine(self.workspace, self.layout, self._lent, survivors)
        else:
            self._engine = KernelEngine(self.workspace, self.layout, self._lent_staging, survivors)

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        *,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        cumulative_recv_stats: torch.Tensor | None = None,
        wait_recv_cost_stats: torch.Tensor | None = None,
        return_recv_hook: bool = False,
        timeout: Timeout | Unset = UNSET,
    ) -> tuple[Received, torch.Tensor, LowLatencyHandle, Hook | None]:
        """Send each token to the owners of its experts, once for each expert. **Collective.**

        Args:
            x: [T, H] of the exchange's dtype, T from 0 to M.
            topk_idx: [T, k] int64, k up to `max_topk` and the same on every rank; -1 for no choice.
            use_fp8: quantise rows on their way, see `quantise`. The same on every rank, as the next two.
            round_scale: with powers of two as scales; of no meaning without `use_fp8`.
            use_ue8m0: and give their exponents, four to an int32; needs `round_scale`.
            cumulative_recv_stats: [El] int32, to which the counts are added.
            wait_recv_cost_stats: [R] int64, or [R, R], of which this rank's row is meant, to which the
                microseconds waited for each source are added.
            return_recv_hook: return after sending; the hook receives. Results are there after it.
            timeout: of this call.

        Returns:
            (recv_x, recv_count, handle, hook). recv_x [El, R * M, H], or (float8_e4m3fn, scales) with
            scales float32 [El, R * M, H / 128] or int32 [El, R * M, ceil(H / 512)], rows innermost in
            memory. recv_count int32 [El]: rows of expert e are the first recv_count[e], ordered by source
            and token; what follows is undefined. hook: None without `return_recv_hook`.

        Raises:
            ConfigError: when an argument is wrong; nothing was sent.
            UsageError: when two results are alive.
            CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
        """
        workspace, layout, scaling = self.workspace, self.layout, (use_fp8, round_scale, use_ue8m0)
        check_dispatch(x, topk_idx, layout, self.dtype, workspace.device, scaling)
        waits = self._check_statistics(cumulative_recv_stats, wait_recv_cost_stats)
        form = RowFormat(layout.hidden, self.dtype, *(scaling if use_fp8 else (False, False, False)))
        call = self._describe("low_latency_dispatch", topk_idx.shape[1], str(form))
        seconds = workspace.seconds(timeout)

        def receive(job: DispatchJob) -> None:
            self._engine.receive_dispatch(job)
            job.handle.missing = frozenset(self.masks.survivors.masked)

        def send() -> tuple[DispatchJob, Hook | None]:
            workspace.drain()
            handle = self._next_handle(topk_idx)
            job = DispatchJob(x, form, handle, call, seconds, cumulative_recv_stats, waits)
            self._engine.send_dispatch(job)
            self._admit(handle)
            return job, self._complete(lambda: receive(job), return_recv_hook)

        job, hook = workspace.run(send)
        packed = job.handle.packed
        rows = packed.rows_as(form)
        received = (rows, packed.scales_as(form)) if use_fp8 else rows
        return received, packed.counts, job.handle, hook

    def combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: LowLatencyHandle,
        *,
        zero_copy: bool = False,
        out: torch.Tensor | None = None,
        return_recv_hook: bool = False,
        timeout: Timeout | Unset = UNSET,
    ) -> tuple[torch.Tensor, Hook | None]:
        """Give the experts' rows back, and sum up `topk_weights[t, j] * y(t, j)`. **Collective.**

        The sum is in float32, in the order of the choices, and rounded once. The result's memory is free
        again afterwards.

        Args:
            x: [El, R * M, H] of the exchange's dtype, where row i of expert e belongs to row i of recv_x.
            topk_idx: [T, k] int64, that of the dispatch; a -1 leaves a choice out.
            topk_weights: [T, k] float32.
            handle: of the dispatch.
            zero_copy: x is `next_combine_buffer(handle)`, from which sources read; the same on every rank.
            out: [T, H], contiguous, written and returned; a new tensor where None.
            return_recv_hook: return after sending; the hook sums up. x may be written again after it.
            timeout: of this call.

        Returns:
            ([T, H], hook or None).

        Raises:
            ConfigError: when an argument is wrong; nothing was sent.
            UsageError: when the handle's result is not alive, or its dispatch raised.
            CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
        """
        workspace = self.workspace
        self._refuse_dead(handle)
        check_combine(x, topk_idx, topk_weights, out, handle.topk_idx, self.layout, self.dtype)
        if zero_copy and x.data_ptr() != self.next_combine_buffer(handle).data_ptr():
            raise ConfigError("zero_copy=True takes what next_combine_buffer(handle) gave, and nothing else")
        if out is None:
            out = torch.empty(len(topk_idx), self.layout.hidden, dtype=self.dtype, device=workspace.device)
        # Ranks count back, since those that come later have not counted all.
        told = f"of the last dispatch but {self._num_dispatched - handle.number}"
        flags = f"zero_copy {told}" if zero_copy else told
        call = self._describe("low_latency_combine", topk_idx.shape[1], flags)
        seconds, weights = workspace.seconds(timeout), topk_weights.detach()
        job = CombineJob(x, topk_idx, weights, handle, zero_copy, out, call, seconds)

        def receive() -> None:
            self._engine.receive_combine(job)
            self._results.release(handle)

        def send() -> Hook | None:
            workspace.drain()
            if handle.missing is None:
                raise UsageError("the handle's result was not received: its dispatch raised; dispatch again")
            self._engine.send_combine(job)
            return self._complete(receive, return_recv_hook)

        return out, workspace.run(send)

    def is_alive(self, handle: LowLatencyHandle) -> bool:
        """Whether a result has not been combined yet."""
        return self._results.is_alive(handle)

    def next_combine_buffer(self, handle: LowLatencyHandle) -> torch.Tensor:
        """Where experts may put what they give back, so that nobody copies it: see `combine`.

        **Collective** the first time, which makes the memory: as much again as two results.

        Returns:
            [El, R * M, H] of the exchange's dtype; to be written after the result was received, and the
            handle's own until it is combined.

        Raises:
            UsageError: when the handle's result is not alive, or the memory is still to be made and ranks
                are masked.
            CapabilityError: when there is no memory for it.
        """
        self._refuse_dead(handle)
        return self._lent(self.workspace.rank, handle.packed.number)

    def _lent(self, rank: int, number: int) -> torch.Tensor:
        """What `rank` lends of its result `number`."""
        layout = self.layout
        shape = (layout.num_local_experts, layout.capacity, layout.hidden)
        return self._lending_space().view(rank, number, 0, shape, self.dtype)

    def _lending_space(self) -> Workspace:
        """Memory of what is lent: a half for each result. **Collective** the first time."""
        if self._combine_space is None:
            space = self.workspace
            self.masks.survivors.refuse_if_masked()
            if masked := sorted(self.masks.survivors.masked):
                raise UsageError(
                    f"next_combine_buffer() makes memory on all ranks the first time, and ranks {masked} are "
                    "masked; call it once before, or combine without zero_copy"
                )
            self._combine_space = Workspace(
                self._combine_members, self.layout.combine_nbytes,
                timeout=space.timeout, device=space.device, engine=space.engine,
            )  # fmt: skip
        return self._combine_space

    def _lent_staging(self) -> Staging:
        staging = self._lending_space().arena.staging
        assert staging is not None
        return staging

    def close(self) -> None:
        """Leave the exchange and give its memory back. Not collective; may be called twice."""
        self.masks.close()
        for space in (self._combine_space, self.workspace):
            if space is not None:
                space.close()

    def _complete(self, receive: Callable[[], None], later: bool) -> Hook | None:
        if later:
            return self.workspace.defer(receive)
        receive()
        return None

    def _check_statistics(
        self, counts: torch.Tensor | None, waits: torch.Tensor | None
    ) -> torch.Tensor | None:
        """What waits are added to, [R], when both fit."""
        ranks, device = self.workspace.world_size, self.workspace.device
        shapes = ((self.layout.num_local_experts,),)
        check_statistics(counts, "cumulative_recv_stats", torch.int32, shapes, device)
        check_statistics(waits, "wait_recv_cost_stats", torch.int64, ((ranks,), (ranks, ranks)), device)
        return waits[self.workspace.rank] if waits is not None and waits.dim() > 1 else waits

    def _admit(self, handle: LowLatencyHandle) -> None:
        self._num_dispatched += 1
        handle.number = self._num_dispatched
        self._results.admit(handle)

    def _next_handle(self, topk_idx: torch.Tensor) -> LowLatencyHandle:
        """A handle with memory that nobody uses."""
        self._results.refuse_another()
        packed = next(memory for memory in self._packed if not self._is_in_use(memory))
        # The caller may write other choices there; on a GPU the values are not compared.
        kept = topk_idx.clone() if topk_idx.device.type == "cpu" else topk_idx
        handle = LowLatencyHandle(packed, self.layout, kept)
        self._in_memory[packed.number] = weakref.ref(handle)
        return handle

    def _is_in_use(self, memory: Packed) -> bool:
        ref = self._in_memory[memory.number]
        handle = None if ref is None else ref()
        return handle is not None and self._results.is_alive(handle)

    def _refuse_dead(self, handle: LowLatencyHandle) -> None:
        if not self.is_alive(handle):
            raise UsageError("the handle has no result here: it was combined, or is another exchange's")

    def _describe(self, op: str, topk: int, flags: str) -> CallDescription:
        layout = self.layout
        if self.masks.on_timeout != "raise":
            flags = f"{flags} on_timeout={self.masks.on_timeout}".strip()
        shape = (layout.max_tokens, layout.hidden, self.num_experts, topk)
        return CallDescription(
            op, dtype_name(self.dtype), shape, contents=flags, algorithm=self.workspace.engine
        )
