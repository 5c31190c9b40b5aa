"""A buffer for few tokens whose ranks come and go while its addresses stay."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from tcomm.errors import UsageError
from tcomm.groups.arguments import UNSET, Timeout, Unset
from tcomm.groups.handle import SETUP_SECONDS
from tcomm.groups.moe.elastic_members import ElasticMembers, Facts
from tcomm.groups.moe.elastic_results import ElasticHandle, KeptResults, Receive
from tcomm.groups.moe.low_latency import LowLatency, size_hint
from tcomm.groups.moe.low_latency_masks import Masks
from tcomm.groups.moe.overlap import EventOverlap
from tcomm.groups.setup import Membership
from tcomm.memory.exchange import LocalExchange, Store
from tcomm.memory.moe_slots import RowFormat, SlotLayout

__all__ = ["ElasticBuffer", "ElasticHandle"]

_MAX_TOPK = 11
_Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class ElasticBuffer:
    """Low-latency dispatch and combine among ranks whose number changes.

    Expert e lives on rank e // experts per rank. Results have the shape and the addresses of the most ranks
    there may be: what comes from fewer fills the first rows of each expert. A change makes new shared
    memory, while the memory before is in use until the change is committed.

    Args:
        store: of all ranks that there ever are.
        rank: this process; it keeps its number.
        timeout: of calls: seconds, a profile, or None: as long as the peers live.
        engine: `cpu`, or `triton` for kernels; empty: what suits the device.
        on_timeout: what becomes of a rank that is lost: `raise` or `mask`, see `LowLatency`.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        *,
        timeout: Timeout | Unset = UNSET,
        engine: str = "",
        on_timeout: str = "raise",
    ) -> None:
        self.rank = rank
        self._members = ElasticMembers(store, rank, SETUP_SECONDS)
        self._timeout, self._engine, self._on_timeout = timeout, engine, on_timeout
        self.max_ranks = self.num_experts_per_rank = self.num_rdma_bytes = 0
        self._facts: Facts | None = None
        self._active: tuple[Membership, LowLatency | None] | None = None
        self._staged: tuple[Membership, LowLatency | None] | None = None
        self._alone: LowLatency | None = None
        self._is_masked = False
        self._results: KeptResults | None = None

    def update_memory_buffers(
        self,
        num_ranks: int,
        num_experts_per_rank: int,
        num_rdma_bytes: int,
        *,
        max_tokens: int = 0,
        hidden: int = 0,
    ) -> None:
        """Say what there is to be room for. Not collective; before the first ranks are connected.

        Args:
            num_ranks: the most there may ever be.
            num_experts_per_rank: of every rank.
            num_rdma_bytes: at least `get_rdma_size_hint` of the most ranks.
            max_tokens: tokens of a rank in one call; 0: as the first call says.
            hidden: channels; 0: likewise.

        Raises:
            UsageError: when a number makes no sense, or ranks are connected.
        """
        if self._active is not None or min(num_ranks, num_experts_per_rank, num_rdma_bytes) < 1:
            raise UsageError(
                f"a buffer of {num_rdma_bytes} bytes for {num_ranks} ranks with {num_experts_per_rank} "
                "experts each; give positive numbers, before ranks are connected"
            )
        self.max_ranks, self.num_experts_per_rank = num_ranks, num_experts_per_rank
        self.num_rdma_bytes = num_rdma_bytes
        self._facts = Facts(max_tokens, hidden) if max_tokens and hidden else None

    def set_store(self, store: Store) -> None:
        """Meet by another store from now on, which all have that are to meet. Not collective."""
        self._members.store = store

    @staticmethod
    def get_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes to give as `num_rdma_bytes`; ranks and experts are the most there may be."""
        return size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)

    @property
    def num_ranks(self) -> int:
        """Ranks that exchange now."""
        return 0 if self._active is None else self._active[0].exchange.world_size

    def connect_ranks(self, ranks: Sequence[int]) -> None:
        """Take ranks in. **Collective** among all that are in the group then.

        Args:
            ranks: those that come, or all of them; they follow those that are there.

        Raises:
            UsageError: when they leave a gap, or are too many.
            GroupMismatchError, RendezvousError: when they do not come together; the group stays as it was.
        """
        wanted = {*range(self.num_ranks), *ranks}
        if wanted != set(range(len(wanted))) or not 1 <= len(wanted) <= self.max_ranks:
            raise UsageError(
                f"ranks {sorted(ranks)} do not follow {self.num_ranks} of at most {self.max_ranks} ranks"
            )
        self.stage(len(wanted))
        self.commit()

    def disconnect_ranks(self, ranks: Sequence[int]) -> None:
        """Let the last ranks go. **Collective** among those that stay; who goes gives its memory back.

        Args:
            ranks: those that go, from the end.

        Raises:
            UsageError: when others than the last are to go, or all.
            GroupMismatchError, RendezvousError: when the others do not come together.
        """
        left = self.num_ranks - len(set(ranks))
        if left < 1 or set(ranks) != set(range(left, self.num_ranks)):
            raise UsageError(f"ranks {sorted(ranks)} are not the last of {self.num_ranks}, of whom one stays")
        if self.rank >= left:
            self.destroy()
            self._members.leave()
            return
        self.stage(left)
        self.commit()

    def stage(self, num_ranks: int) -> None:
        """Meet the ranks of the next group; this one's goes on. **Collective** among those of the next.

        Args:
            num_ranks: of the next group.

        Raises:
            UsageError: when there is no room for so many.
            GroupMismatchError, RendezvousError: when they do not come together.
        """
        if not 1 <= num_ranks <= self.max_ranks:
            raise UsageError(f"{num_ranks} ranks where there is room for {self.max_ranks}")
        self._drop(self._staged)
        members, self._facts = self._members.meet(num_ranks, self._facts)
        self._staged = members, None

    def commit(self) -> None:
        """Let what was staged be the group, if anything was. Results of the one before are gone."""
        if self._staged is None:
            return
        before, self._active, self._staged = self._active, self._staged, None
        self._drop(before)

    @contextlib.contextmanager
    def mask_remote_ranks(self) -> Iterator[None]:
        """Leave all other ranks out inside: choices of their experts count as none. Not collective."""
        before, self._is_masked = self._is_masked, True
        try:
            yield
        finally:
            self._is_masked = before

    def query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Write 1 for each rank that is left out or lost, and 0 for the others. Not collective.

        Args:
            mask_status: int32 [ranks], written, from rank 0 on.
        """
        mask_status.fill_(1)
        if self._is_masked:
            mask_status[self.rank : self.rank + 1] = 0
            return
        mask_status[: self.num_ranks] = 0
        if self._active is not None and self._active[1] is not None:
            lost = self._active[1].masks.query()[: len(mask_status)]
            mask_status[: self.num_ranks] |= lost.to(mask_status.device)

    @property
    def masks(self) -> Masks | None:
        """Whom the ranks there are go on without; None before they have exchanged anything."""
        return None if self._active is None or self._active[1] is None else self._active[1].masks

    def update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Leave a rank out, or take it in again. Not collective, but the same on all that go on.

        Args:
            rank_to_mask: another rank.
            mask: leave it out.

        Raises:
            UsageError: when the ranks have not exchanged anything yet.
            ConfigError, CapabilityError: as `Masks.update` does.
        """
        if self.masks is None:
            raise UsageError("ranks are masked once there is an exchange; call dispatch() first")
        self.masks.update(rank_to_mask, mask)

    def clean_mask_buffer(self) -> None:
        """Take all ranks in again. **Collective** among all of them, those left out too.

        Raises:
            CommError, CapabilityError: as `Masks.clean` does.
        """
        if self.masks is not None:
            self.masks.clean()

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int = 0,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[_Rows, torch.Tensor, ElasticHandle, EventOverlap, Callable[[], None] | None]:
        """As `Buffer.low_latency_dispatch`, in memory for the most ranks. **Collective** among those now.

        Args:
            x: [T, H] bfloat16.
            topk_idx: [T, k] int64.
            num_max_dispatch_tokens_per_rank: M.
            num_experts: of no influence: as many as the ranks have.
            cumulative_local_expert_recv_stats: int32 [E / R], to which the counts are added.
            use_fp8: quantise on the way.
            round_scale: with powers of two as scales.
            use_ue8m0: and give their exponents.
            return_recv_hook: return after sending; the hook receives.

        Raises:
            UsageError: when no ranks are connected, or the sizes are not those of the buffer.
            ConfigError, UsageError, CommError: as `LowLatency.dispatch` does.
        """
        del num_experts
        engine = self._open(num_max_dispatch_tokens_per_rank, x)
        assert self._results is not None
        assert self._active is not None
        engine.workspace.run(engine.workspace.drain)
        packed = self._results.find_room(self._active[1], self._alone)
        _, _, inner, receive = engine.dispatch(
            x,
            self._own(topk_idx) if self._is_masked else topk_idx,
            use_fp8=use_fp8,
            round_scale=round_scale,
            use_ue8m0=use_ue8m0,
            cumulative_recv_stats=cumulative_local_expert_recv_stats,
            return_recv_hook=True,
        )
        assert receive is not None
        form = RowFormat(x.shape[1], x.dtype, *((use_fp8, round_scale, use_ue8m0) if use_fp8 else ()))
        handle = ElasticHandle(engine, inner, packed)
        self._results.hold(handle)
        hook = Receive(receive, handle, form)
        if not return_recv_hook:
            hook()
        rows = packed.rows_as(form)
        received: _Rows = (rows, packed.scales_as(form)) if use_fp8 else rows
        return received, packed.counts, handle, EventOverlap(), hook if return_recv_hook else None

    def combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: ElasticHandle,
        out: torch.Tensor | None = None,
        return_recv_hook: bool = False,
    ) -> tuple[torch.Tensor, EventOverlap, Callable[[], None] | None]:
        """As `Buffer.low_latency_combine`. **Collective** among the ranks there are.

        Args:
            x: [E / R, most ranks * M, H] bfloat16.
            topk_idx: [T, k] int64, of the dispatch.
            topk_weights: [T, k] float32.
            handle: of the dispatch.
            out: [T, H], written and returned; a new tensor where None.
            return_recv_hook: return after sending; the hook sums up.

        Raises:
            UsageError: when the handle is of a group that is gone.
            ConfigError, UsageError, CommError: as `LowLatency.combine` does.
        """
        engine = handle.exchange
        active = None if self._active is None else self._active[1]
        if engine is not active and engine is not self._alone:
            raise UsageError("the handle is of a group of ranks that is gone; dispatch again")
        idx = self._own(topk_idx) if engine is self._alone else topk_idx
        y = x[:, : engine.layout.capacity].contiguous()
        combined, hook = engine.combine(
            y, idx, topk_weights, handle.inner, out=out, return_recv_hook=return_recv_hook
        )
        return combined, EventOverlap(), hook

    def _open(self, max_tokens: int, x: torch.Tensor) -> LowLatency:
        """The exchange of the group, or of this rank alone. **Collective** at a group's first call."""
        if self._active is None:
            raise UsageError("no ranks are connected; call connect_ranks() first")
        facts = Facts(max_tokens, x.shape[-1])
        if self._facts not in (None, facts):
            raise UsageError(f"{facts} in a buffer for {self._facts}")
        if self._results is None:
            self._allocate(facts, x)
        members, engine = self._active
        if self._is_masked:
            if self._alone is None:
                self._alone = self._make(Membership("alone", LocalExchange(), None, (0,)), facts, x)
            return self._alone
        if engine is None:
            engine = self._make(members, facts, x)
            self._active = members, engine
        return engine

    def _make(self, members: Membership, facts: Facts, x: torch.Tensor) -> LowLatency:
        num_experts = members.exchange.world_size * self.num_experts_per_rank
        engine = LowLatency(
            members, facts.max_tokens, facts.hidden, num_experts,
            dtype=x.dtype, timeout=self._timeout, device=x.device, engine=self._engine,
        )  # fmt: skip
        engine.masks.on_timeout = self._on_timeout
        return engine

    def _allocate(self, facts: Facts, x: torch.Tensor) -> None:
        """Memory of results, once for the most ranks."""
        ranks, experts = self.max_ranks, self.num_experts_per_rank
        needed = size_hint(facts.max_tokens, facts.hidden, ranks, ranks * experts)
        if needed > self.num_rdma_bytes:
            raise UsageError(
                f"num_rdma_bytes={self.num_rdma_bytes} is less than the {needed} bytes of {facts} for "
                f"{ranks} ranks of {experts} experts; see get_rdma_size_hint()"
            )
        layout = SlotLayout(ranks, experts, facts.max_tokens, _MAX_TOPK, facts.hidden, x.itemsize)
        self._facts = facts
        self._results = KeptResults(layout, x.device)

    def _own(self, topk_idx: torch.Tensor) -> torch.Tensor:
        """Choices of this rank's experts, from 0; -1 for those of others."""
        local = topk_idx - self.rank * self.num_experts_per_rank
        return local.masked_fill((local < 0) | (local >= self.num_experts_per_rank), -1)

    def _drop(self, group: tuple[Membership, LowLatency | None] | None) -> None:
        if group is not None and group[1] is not None:
            group[1].close()

    def destroy(self) -> None:
        """Give all shared memory back. Not collective; may be called twice."""
        self._drop(self._staged)
        self._drop(self._active)
        alone, self._alone = self._alone, None
        if alone is not None:
            alone.close()
        self._staged = self._active = None
