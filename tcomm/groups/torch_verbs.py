"""Each verb in the terms of torch.distributed, on contiguous tensors and a table of parts.

Data that only moves is handed over as bytes: gloo and NCCL refuse types that they need not know.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from tcomm.groups.fallback import TorchFallback
from tcomm.parts import Parts, Range
from tcomm.signature import CallDescription

__all__ = ["TorchPlan", "make_torch_plan"]

TorchPlan = Callable[[torch.Tensor, torch.Tensor, "float | None"], None]
"""Takes contiguous x and out and the timeout in seconds. **Collective.** Raises what `TorchFallback` does."""

_OPS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.SUM,
    "product": dist.ReduceOp.PRODUCT,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "band": dist.ReduceOp.BAND,
    "bor": dist.ReduceOp.BOR,
    "bxor": dist.ReduceOp.BXOR,
}


def make_torch_plan(fallback: TorchFallback, call: CallDescription, parts: Parts | None) -> TorchPlan:
    """How torch carries out `call`, of which `parts` says what goes where, in elements."""
    verbs = _Verbs(fallback, call)
    if parts is None:
        return verbs.all_reduce if call.reduce else verbs.barrier
    run: Callable[[Parts, torch.Tensor, torch.Tensor, float | None], None] = {
        "broadcast": verbs.broadcast,
        "reduce": verbs.reduce,
        "all_gather_single": verbs.all_gather,
        "all_gatherv": verbs.all_gatherv,
        "gather": verbs.gather,
        "scatter": verbs.scatter,
        "reduce_scatter_single": verbs.reduce_scatter,
        "reduce_scatterv": verbs.reduce_scatterv,
        "all_to_all_single": verbs.all_to_all,
    }[call.op]

    def move_or_reduce(x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
        if call.reduce:
            run(parts, x.view(-1), out.view(-1), timeout)
        else:
            run(parts.scaled(x.itemsize), _as_bytes(x), _as_bytes(out), timeout)

    return move_or_reduce


class _Verbs:
    """The verbs; x and out are flat, and parts count their elements."""

    def __init__(self, fallback: TorchFallback, call: CallDescription) -> None:
        self._fallback = fallback
        self._call = call
        self._rank = fallback.rank
        self._group = fallback.group
        self._scale = 1.0 / fallback.world_size if call.reduce == "avg" else None

    def _run(self, timeout: float | None, start: Callable[[], dist.Work | None]) -> None:
        self._fallback.run(self._call.op, timeout, start, self._call.algorithm == "torch:nccl")

    def barrier(self, x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
        """The ranks have agreed to be here, and that is all."""

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
        if out is not x:
            out.copy_(x)
        op = self._op(x)
        self._run(timeout, lambda: dist.all_reduce(out, op, group=self._group, async_op=True))
        self._average(out)

    def _op(self, x: torch.Tensor) -> dist.ReduceOp.RedOpType:
        # gloo adds the bytes of bools, and a bool whose byte is 2 is equal to neither True nor False.
        name = "max" if x.dtype is torch.bool and self._call.reduce == "sum" else self._call.reduce
        return _OPS[name]

    def _average(self, total: torch.Tensor) -> None:
        if self._scale is not None:
            total.mul_(self._scale)

    def reduce(self, parts: Parts, x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:  # noqa: ARG002
        op, root, whole = self._op(x), self._call.root, x.clone()
        self._run(
            timeout, lambda: dist.reduce(whole, group_dst=root, op=op, group=self._group, async_op=True)
        )
        if self._rank == root:
            self._average(whole)
            out.copy_(whole)

    def reduce_scatter(self, parts: Parts, x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
        if self._fallback.is_gloo:
            self.reduce_scatterv(parts, x, out, timeout)
            return
        op = self._op(x)
        self._run(timeout, lambda: dist.reduce_scatter_tensor(out, x, op, group=self._group, async_op=True))
        self._average(out)

    def reduce_scatterv(
        self, parts: Parts, x: torch.Tensor, out: torch.Tensor, timeout: float | None
    ) -> None:
        whole = torch.empty_like(x)
        self.all_reduce(x, whole, timeout)
        out.copy_(_cut(whole, parts.sends[self._rank]))

    def broadcast(self, parts: Parts, x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:  # noqa: ARG002
        if self._rank == self._call.root and out.data_ptr() != x.data_ptr():
            out.copy_(x)
        self._broadcast(out, self._call.root, timeout)

    def _broadcast(self, x: torch.Tensor, root: int, timeout: float | None) -> None:
        self._run(timeout, lambda: dist.broadcast(x, group_src=root, group=self._group, async_op=True))

    def all_gather(self, parts: Parts, x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
        rows = [_cut(out, part) for part in parts.receives]
        self._run(timeout, lambda: dist.all_gather(rows, x, group=self._group, async_op=True))

    def all_gatherv(self, parts: Parts, x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
        _cut(out, parts.receives[self._rank]).copy_(x)
        for source, part in enumerate(parts.receives):
            if part[1]:
                self._broadcast(_cut(out, part), source, timeout)

    def gather(self, parts: Parts, x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
        root = self._call.root
        rows = [_cut(out, part) for part in parts.receives] if self._rank == root else None
        self._run(timeout, lambda: dist.gather(x, rows, group_dst=root, group=self._group, async_op=True))

    def scatter(self, parts: Parts, x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
        root = self._call.root
        rows = [_cut(x, part) for part in parts.sends] if self._rank == root else None
        self._run(timeout, lambda: dist.scatter(out, rows, group_src=root, group=self._group, async_op=True))

    def all_to_all(self, parts: Parts, x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
        sends = [numel for _, numel in parts.sends]
        receives = [numel for _, numel in parts.receives]
        if x.data_ptr() == out.data_ptr():
            # gloo receives while it still sends.
            x = x.clone()
        self._run(
            timeout,
            lambda: dist.all_to_all_single(out, x, receives, sends, group=self._group, async_op=True),
        )


def _as_bytes(x: torch.Tensor) -> torch.Tensor:
    # A single element may have any stride and be contiguous, and could not be seen as bytes.
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8)


def _cut(x: torch.Tensor, part: Range) -> torch.Tensor:
    return x[part[0] : part[0] + part[1]]
