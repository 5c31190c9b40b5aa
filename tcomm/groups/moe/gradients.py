"""Dispatch and combine of the high-throughput exchange, as steps that autograd goes back through.

What dispatch copies, its gradient sums up, so the backward of dispatch is combine, and that of combine is
dispatch along the same routes.

Source: the training example of DeepEP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tcomm.errors import ConfigError
from tcomm.groups.moe.high_throughput import HighThroughput
from tcomm.groups.moe.routing import Routing

__all__ = ["combine_tokens", "dispatch_tokens"]


def dispatch_tokens(
    exchange: HighThroughput,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Routing]:
    """Send tokens to the ranks of their experts. **Collective**, and so is its backward.

    Args:
        exchange: of the group.
        x: [T, H], this rank's tokens.
        topk_idx: int64 [T, k], experts of each token; -1: none.
        topk_weights: float32 [T, k].
        num_experts: of all ranks.

    Returns:
        Tokens that came [N, H], their local experts int64 [N, k] or -1, their weights float32 [N, k], and
        the handle for `combine_tokens`.

    Raises:
        ConfigError, CommError: as `HighThroughput.dispatch` does.
    """
    came, weights, idx, handle = _Dispatch.apply(  # type: ignore[no-untyped-call]
        exchange, x, topk_weights, topk_idx, num_experts
    )
    return came, idx, weights, handle


def combine_tokens(exchange: HighThroughput, y: torch.Tensor, handle: Routing) -> torch.Tensor:
    """Sum up on each token's rank what the others made of it. **Collective**, and so is its backward.

    Args:
        exchange: of the group.
        y: [N, H], a row for each token that came.
        handle: of the dispatch.

    Returns:
        [T, H].

    Raises:
        ConfigError, CommError: as `HighThroughput.combine` does.
    """
    result: torch.Tensor = _Combine.apply(exchange, y, handle)  # type: ignore[no-untyped-call]
    return result


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        exchange: HighThroughput,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_idx: torch.Tensor,
        num_experts: int,
    ) -> tuple[object, ...]:
        if x.dtype.itemsize < 2:
            raise ConfigError(f"gradients of {x.dtype} are not summed; dispatch x as it was before")
        came = exchange.dispatch(x, topk_idx, topk_weights, num_experts)
        ctx.exchange, ctx.handle = exchange, came.handle
        ctx.mark_non_differentiable(came.topk_idx)
        return came.x, came.topk_weights, came.topk_idx, came.handle

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: torch.Tensor, grad_weights: torch.Tensor, *_: object) -> tuple[Any, ...]:
        grads = ctx.exchange.combine(grad_x.contiguous(), ctx.handle, grad_weights.contiguous())
        return None, *grads, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: HighThroughput, y: torch.Tensor, handle: Routing) -> torch.Tensor:
        ctx.exchange, ctx.handle = exchange, handle
        return exchange.combine(y, handle)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        came = ctx.exchange.dispatch(grad.contiguous(), None, None, 0, handle=ctx.handle)
        return None, came.x, None
