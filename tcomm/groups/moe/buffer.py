"""A buffer with the methods of `deep_ep.Buffer`, over this package's exchanges of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tcomm.errors import CapabilityError, UsageError
from tcomm.groups.moe.buffer_config import Config, check_num_sms, config_for
from tcomm.groups.moe.buffer_memory import BufferMemory
from tcomm.groups.moe.low_latency import LowLatency, size_hint
from tcomm.groups.moe.overlap import EventOverlap
from tcomm.groups.moe.routing import make_layout

__all__ = ["Buffer"]

_Tokens = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
_Hook = Callable[[], None]


class Buffer(BufferMemory):
    """Memory through which ranks exchange tokens, by two protocols. **Collective** to create.

    Arguments and results are those of `deep_ep.Buffer`; code written for it runs with
    `from tcomm.deep_ep import Buffer`. The memory of a protocol is made at its first call, which is
    collective and on the device of the tokens. Of two limits of the original there are none: any number of
    ranks, and any hidden size that is a multiple of 8. See `BufferMemory` for what it is made of.
    """

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, EventOverlap]:
        """Count where this rank's tokens go. Not collective.

        Args:
            topk_idx: [T, k] int64; -1 where nothing is selected.
            num_experts: of all ranks.
            previous_event: awaited first, by the current stream.
            async_finish: give an event back.
            allocate_on_comm_stream: needs both; of no influence.

        Returns:
            int32 [R] tokens for each rank, None, int32 [E] tokens for each expert, bool [T, R] which token
            goes where, and the event.

        Raises:
            UsageError: when `allocate_on_comm_stream` stands alone.
            ConfigError: as `make_layout` does.
        """
        _begin(previous_event, async_finish, allocate_on_comm_stream)
        engine = self._engine or ("cpu" if topk_idx.device.type == "cpu" else "triton")
        found = make_layout(topk_idx, num_experts, self.group_size, engine)
        counts = (found.num_tokens_per_rank, None, found.num_tokens_per_expert, found.is_token_in_rank)
        return (*counts, _end(async_finish))

    def dispatch(  # noqa: PLR0913
        self,
        x: _Tokens,
        handle: Any | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[_Tokens, torch.Tensor | None, torch.Tensor | None, list[int] | None, Any, EventOverlap]:
        """Give tokens to the ranks that hold their experts, one copy for each rank. **Collective.**

        Args:
            x: [T, H], or float8_e4m3fn [T, H] with scales; see `HighThroughput.dispatch`.
            handle: of an earlier dispatch, to send other rows the same ways.
            num_tokens_per_rank: of `get_dispatch_layout`; needed without a handle, as the next three are.
            num_tokens_per_rdma_rank: of no influence.
            is_token_in_rank: of `get_dispatch_layout`.
            num_tokens_per_expert: of `get_dispatch_layout`; says how many experts there are.
            topk_idx: [T, k] int64.
            topk_weights: [T, k] float32, or None.
            expert_alignment: what the counts of the list are rounded up to.
            num_worst_tokens: rows of the results whatever comes, without waiting for a GPU; 0: exact.
            config: of no influence.
            previous_event: as for `get_dispatch_layout`.
            async_finish: as for `get_dispatch_layout`.
            allocate_on_comm_stream: as for `get_dispatch_layout`.

        Returns:
            Rows, int64 [N, k] experts of this rank from 0 or -1, float32 [N, k] weights, rows for each
            expert of this rank, handle, event. With a handle given, what lies between is None.

        Raises:
            UsageError: when there is no high-throughput memory, or a part of the layout is missing.
            ConfigError, CommError: as `HighThroughput.dispatch` does.
        """
        del num_tokens_per_rdma_rank, config
        _begin(previous_event, async_finish, allocate_on_comm_stream)
        if handle is None:
            layout = (num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert, topk_idx)
            if num_tokens_per_expert is None or any(part is None for part in layout):
                raise UsageError(
                    "dispatch without a handle takes num_tokens_per_rank, is_token_in_rank and "
                    "num_tokens_per_expert of get_dispatch_layout(), and topk_idx"
                )
            num_experts = num_tokens_per_expert.numel()
        elif topk_idx is not None or topk_weights is not None:
            raise UsageError("dispatch with a handle takes no topk_idx and topk_weights: rows go as before")
        else:
            num_experts = handle.num_experts
        received = self.high_throughput(_device_of(x)).dispatch(
            x,
            topk_idx,
            topk_weights,
            num_experts,
            handle=handle,
            expert_alignment=expert_alignment,
            num_worst_tokens=num_worst_tokens,
        )
        rows, ids, weights = received.x, received.topk_idx, received.topk_weights
        counts, kept = received.num_tokens_per_expert, received.handle
        if handle is not None:
            return rows, None, None, None, None, _end(async_finish)
        return rows, ids, weights, counts, kept, _end(async_finish)

    def combine(
        self,
        x: torch.Tensor,
        handle: Any,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Give rows back to where they came from, and add up those of each token. **Collective.**

        Args:
            x: [N, H], a row for each that was received.
            handle: of the dispatch.
            topk_weights: [N, k] float32 to add up likewise, or None.
            bias: one or two of [T, H] to add, or None.
            config: of no influence.
            previous_event: as for `get_dispatch_layout`.
            async_finish: as for `get_dispatch_layout`.
            allocate_on_comm_stream: as for `get_dispatch_layout`.

        Returns:
            [T, H], float32 [T, k] or None, event.

        Raises:
            UsageError: when there is no high-throughput memory.
            ConfigError, CommError: as `HighThroughput.combine` does.
        """
        del config
        _begin(previous_event, async_finish, allocate_on_comm_stream)
        combined, weights = self.high_throughput(_device_of(x)).combine(x, handle, topk_weights, bias)
        return combined, weights, _end(async_finish)

    def low_latency_dispatch(  # noqa: PLR0913
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[_Tokens, torch.Tensor, Any, EventOverlap, _Hook | None]:
        """Send each token to the owners of its experts, once for each expert. **Collective.**

        Args:
            x: [T, H] bfloat16, T at most M.
            topk_idx: [T, k] int64; -1 where nothing is selected.
            num_max_dispatch_tokens_per_rank: M, the same on every rank.
            num_experts: E, of all ranks.
            cumulative_local_expert_recv_stats: int32 [E / R], to which the counts are added.
            dispatch_wait_recv_cost_stats: int64 [R, R], to whose row of this rank microseconds are added.
            use_fp8: quantise on the way.
            round_scale: with powers of two as scales.
            use_ue8m0: and give their exponents, four to an int32.
            async_finish: give an event back.
            return_recv_hook: return after sending; the hook receives.

        Returns:
            [E / R, R * M, H], or that in float8_e4m3fn with scales; int32 [E / R] valid rows; the handle;
            the event; the hook or None. They lie in the buffer's memory: two of them at most.

        Raises:
            UsageError: when the buffer is not of that mode, or both an event and a hook are wanted.
            ConfigError, UsageError, CommError: as `LowLatency.dispatch` does.
        """
        _begin_low_latency(async_finish, return_recv_hook)
        sizes = (num_max_dispatch_tokens_per_rank, x.shape[-1], num_experts)
        received, counts, handle, hook = self.low_latency(*sizes, x.device).dispatch(
            x,
            topk_idx,
            use_fp8=use_fp8,
            round_scale=round_scale,
            use_ue8m0=use_ue8m0,
            cumulative_recv_stats=cumulative_local_expert_recv_stats,
            wait_recv_cost_stats=dispatch_wait_recv_cost_stats,
            return_recv_hook=return_recv_hook,
        )
        return received, counts, handle, _end(async_finish), hook

    def low_latency_combine(  # noqa: PLR0913
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: Any,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, EventOverlap, _Hook | None]:
        """Give the experts' rows back, and sum up `topk_weights[t, j] * y(t, j)`. **Collective.**

        Args:
            x: [E / R, R * M, H] bfloat16, in the places of the dispatch's rows.
            topk_idx: [T, k] int64, of the dispatch.
            topk_weights: [T, k] float32.
            handle: of the dispatch.
            use_logfmt: False; rows come back as they are.
            zero_copy: x is what `get_next_low_latency_combine_buffer` gave.
            async_finish: give an event back.
            return_recv_hook: return after sending; the hook sums up.
            out: [T, H], written and returned; a new tensor where None.
            combine_wait_recv_cost_stats: None; see the dispatch's.

        Returns:
            [T, H], the event, the hook or None.

        Raises:
            UsageError: when the buffer is not of that mode, or both an event and a hook are wanted.
            CapabilityError: when rows are to be packed, or waits counted.
            ConfigError, UsageError, CommError: as `LowLatency.combine` does.
        """
        _begin_low_latency(async_finish, return_recv_hook)
        if use_logfmt or combine_wait_recv_cost_stats is not None:
            raise CapabilityError("low_latency_combine neither packs rows (use_logfmt) nor counts waits")
        combined, hook = self._engine_of(handle, x.device).combine(
            x,
            topk_idx,
            topk_weights,
            handle,
            zero_copy=zero_copy,
            out=out,
            return_recv_hook=return_recv_hook,
        )
        return combined, _end(async_finish), hook

    def get_next_low_latency_combine_buffer(self, handle: Any) -> torch.Tensor:
        """[E / R, R * M, H] where the experts may put what is combined with `zero_copy=True`.

        **Collective** the first time.

        Raises:
            UsageError: when the handle's result is not alive.
        """
        return self._engine_of(handle, handle[0].device).next_combine_buffer(handle)

    def _engine_of(self, handle: Any, device: torch.device) -> LowLatency:
        max_tokens, hidden, num_experts = handle[2], handle[3], handle[4]
        return self.low_latency(max_tokens, hidden, num_experts, device)

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Nothing to do: the two protocols have memory apart. Not collective.

        Args:
            num_max_dispatch_tokens_per_rank: M.
            hidden: H.
            num_experts: E.

        Raises:
            UsageError: when the buffer is too small for these numbers.
        """
        self.check_low_latency(num_max_dispatch_tokens_per_rank, hidden, num_experts)

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes to give as `num_rdma_bytes`.

        Args:
            num_max_dispatch_tokens_per_rank: M.
            hidden: H.
            num_ranks: R.
            num_experts: E.
        """
        return size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Limit the processors of a GPU that exchanges use, for all buffers; of no influence on kernels.

        Raises:
            UsageError: when the number is odd or negative.
        """
        check_num_sms(new_num_sms)
        Buffer.num_sms = new_num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """What suits a dispatch of so many ranks.

        Raises:
            UsageError: when there is no rank.
        """
        return config_for(num_ranks, Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """What suits a combine of so many ranks.

        Raises:
            UsageError: when there is no rank.
        """
        return config_for(num_ranks, Buffer.num_sms)

    @staticmethod
    def capture() -> EventOverlap:
        """The end of what the current stream has been given so far."""
        return EventOverlap.now()

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether kernels of the newer GPUs are there: they are compiled where they run."""
        return True


def _begin(previous: EventOverlap | None, async_finish: bool, allocate_on_comm_stream: bool) -> None:
    if allocate_on_comm_stream and (previous is None or not async_finish):
        raise UsageError("allocate_on_comm_stream takes both previous_event and async_finish")
    if previous is not None:
        previous.current_stream_wait()


def _begin_low_latency(async_finish: bool, return_recv_hook: bool) -> None:
    if async_finish and return_recv_hook:
        raise UsageError("async_finish and return_recv_hook exclude each other")


def _end(async_finish: bool) -> EventOverlap:
    return EventOverlap.now() if async_finish else EventOverlap()


def _device_of(x: _Tokens) -> torch.device:
    return x[0].device if isinstance(x, tuple) else x.device
