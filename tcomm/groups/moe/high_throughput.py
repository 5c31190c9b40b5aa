"""Dispatch and combine for many tokens: one copy of a token for each rank that needs it, exact sizes."""

from __future__ import annotations

import dataclasses

import torch

from tcomm.errors import ConfigError
from tcomm.groups.arguments import UNSET, Timeout, Unset
from tcomm.groups.moe.host_engine import HostEngine
from tcomm.groups.moe.jobs import CombineJob, DispatchJob, Engine, Received, Tokens
from tcomm.groups.moe.kernel_engine import KernelEngine
from tcomm.groups.moe.routing import Routing
from tcomm.groups.moe.token_checks import check_choices, check_results, check_rounding, check_tokens
from tcomm.groups.moe.workspace import Workspace
from tcomm.groups.setup import Membership

__all__ = ["Dispatched", "HighThroughput"]


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """What a rank received. Rows are ordered by source rank, then by token."""

    x: Tokens
    """[N, H], or that and its scales."""
    topk_idx: torch.Tensor | None
    """[N, k] int64: experts of this rank, from 0; -1 for those of others. None of a cached dispatch."""
    topk_weights: torch.Tensor | None
    """[N, k] float32: 0 where `topk_idx` is -1."""
    num_tokens_per_expert: list[int] | None
    """Rows for each expert of this rank, rounded up; empty where nobody waits for counts."""
    handle: Routing | None
    """For the way back; can be used any number of times."""


class HighThroughput:
    """Exchange of tokens with exact sizes. **Collective** to create.

    Results are ordinary tensors. A message longer than the buffer goes in pieces.

    Args:
        members: who takes part.
        num_nbytes: of the buffer of each rank; the same on all.
        timeout: of waits: seconds, a profile, or None: as long as the peers live.
        device: of the tokens.
        engine: `cpu`, or `triton` for kernels; empty: what suits the device.

    Raises:
        ConfigError: when an argument is wrong.
        CapabilityError: when there is no shared memory, or too little.
        RendezvousError, GroupMismatchError: as `Communicator` does.
    """

    def __init__(
        self,
        members: Membership,
        num_nbytes: int,
        *,
        timeout: Timeout | Unset = UNSET,
        device: torch.device | str = "cpu",
        engine: str = "",
    ) -> None:
        if type(num_nbytes) is not int or num_nbytes < 1:
            raise ConfigError(f"num_nbytes={num_nbytes!r} is not a positive number of bytes")
        self.workspace = Workspace(members, num_nbytes // 2, timeout=timeout, device=device, engine=engine)
        self.rank, self.world_size = self.workspace.rank, self.workspace.world_size
        self._num_dispatched = 0
        is_host = self.workspace.engine == "cpu"
        self._engine: Engine = HostEngine(self.workspace) if is_host else KernelEngine(self.workspace)

    def close(self) -> None:
        """Give the memory back. Not collective."""
        self.workspace.close()

    @torch.no_grad()
    def dispatch(
        self,
        x: Tokens,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        num_experts: int,
        *,
        handle: Routing | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        timeout: Timeout | Unset = UNSET,
    ) -> Dispatched:
        """Give each token to the ranks that hold its experts. **Collective.** Records no gradient.

        Args:
            x: [T, H] bfloat16, float16 or float32, H a multiple of 8, contiguous; or [T, H] float8_e4m3fn
                with scales [T, H / 128] float32, or [T, ceil(H / 512)] int32. T may differ by rank, and be 0.
            topk_idx: [T, k] int64; -1 where nothing is selected. None with a handle.
            topk_weights: [T, k] float32, or None.
            num_experts: of all ranks, a multiple of their number.
            handle: of an earlier dispatch, to send other rows the same ways.
            expert_alignment: what counts of the list are rounded up to.
            num_worst_tokens: rows of the results whatever comes, so that a GPU is not waited for; 0: exact.
            timeout: of this call.

        Raises:
            ConfigError: on this rank only, when an argument is wrong (nothing was sent); on all, when more
                than `num_worst_tokens` rows come to one of them, or with it no rank's tokens fit the buffer.
            UsageError: on every rank that has it, when the handle belongs to another dispatch than a peer's.
            CollectiveMismatchError: on all, when they call different things, or with `num_worst_tokens` the
                tokens of some do not fit the buffer.
            PeerLostError, PeerTimeoutError: from the wait.
            DecodeError: when a peer's memory is not what it published; the exchange is over.
        """
        rows, scales = check_tokens(x, self.workspace.device)
        check_choices(
            len(rows), topk_idx, topk_weights, num_experts, self.world_size, handle,
            self.workspace.device, may_wait=not num_worst_tokens,
        )  # fmt: skip
        check_rounding(expert_alignment, num_worst_tokens)
        job = DispatchJob(
            rows, scales, topk_idx, topk_weights, handle, num_experts, expert_alignment, num_worst_tokens,
            self.workspace.seconds(timeout),
        )  # fmt: skip
        received = self.workspace.run(lambda: self._dispatch(job))
        return _results_of(job, received, self.rank, self.world_size)

    def _dispatch(self, job: DispatchJob) -> Received:
        received = self._engine.dispatch(job)
        if job.handle is None:
            self._num_dispatched += 1
            received.routing.number = self._num_dispatched
        return received

    @torch.no_grad()
    def combine(
        self,
        x: torch.Tensor,
        handle: Routing,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        *,
        timeout: Timeout | Unset = UNSET,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Give rows back to where they came from, which adds up those of each token. **Collective.**

        Nothing is weighted. Sums are float32, in the order in which the ranks come in a token's list, then
        bias; they are rounded once. A token that went nowhere gets 0, and bias. Records no gradient.

        Args:
            x: [N, H], a row for each that was received, bfloat16, float16 or float32.
            handle: of the dispatch.
            topk_weights: [N, k] float32 to add up likewise, or None.
            bias: one or two of [T, H] in the dtype of x to add, or None.
            timeout: of this call.

        Returns:
            [T, H] in the dtype of x, and [T, k] float32 or None.

        Raises:
            ConfigError: on this rank only, when an argument is wrong. Nothing was sent.
            CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
        """
        terms = check_results(x, handle, topk_weights, bias, self.world_size, self.workspace.device)
        job = CombineJob(x, handle, topk_weights, terms, self.workspace.seconds(timeout))
        return self.workspace.run(lambda: self._engine.combine(job))


def _results_of(job: DispatchJob, received: Received, rank: int, world_size: int) -> Dispatched:
    """What came, as the caller wants it."""
    rows = received.rows.view(job.rows.dtype)
    facts, topk = received.facts, 0 if job.topk_idx is None else job.topk_idx.shape[1]
    x: Tokens = rows
    if job.scales is not None:
        x = rows, facts[:, -job.scales.shape[1] :].contiguous().view(job.scales.dtype)
    if job.topk_idx is None:
        return Dispatched(x, None, None, None, None)
    num_local = job.num_experts // world_size
    idx = facts[:, :topk].to(torch.int64) - rank * num_local
    elsewhere = (idx < 0) | (idx >= num_local)
    idx.masked_fill_(elsewhere, -1)
    weights = None
    if job.topk_weights is not None:
        weights = facts[:, topk : 2 * topk].contiguous().view(torch.float32).masked_fill_(elsewhere, 0)
    counts: list[int] = []
    if not job.num_worst_tokens:
        found = torch.bincount(idx.view(-1) + 1, minlength=num_local + 1)[1:].tolist()
        counts = [-(-count // job.expert_alignment) * job.expert_alignment for count in found]
    return Dispatched(x, idx, weights, counts, received.routing)
