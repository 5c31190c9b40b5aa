"""Verbs that torch.distributed carries out after tcomm has checked them and the ranks have agreed.

They move to tcomm's own algorithms one by one; signatures and guarantees stay.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Literal, overload

import torch

from tcomm.algorithms import reduce_op_name
from tcomm.errors import CapabilityError, CollectiveMismatchError, ConfigError
from tcomm.groups.arguments import (
    UNSET,
    Timeout,
    Unset,
    check_out,
    check_rank,
    check_splits,
    check_tensor,
    dtype_name,
    find_unequal_splits,
    refuse_integer_average,
    refuse_unequal_splits,
)
from tcomm.groups.fallback import TorchFallback
from tcomm.groups.handle import GroupHandle
from tcomm.groups.work import Work
from tcomm.signature import CallDescription

__all__ = ["FallbackVerbs"]


class FallbackVerbs(GroupHandle):
    """Broadcast, gather, scatter, all-to-all and barrier of a communicator."""

    def barrier(self, *, timeout: Timeout | Unset = UNSET) -> None:
        """Return when every rank has called it. **Collective.**

        Raises:
            CollectiveMismatchError, PeerLostError, PeerTimeoutError, GroupClosedError: see `all_reduce`.
        """
        seconds = self._seconds(timeout)

        def run() -> torch.Tensor:
            self._agreement.agree(_BARRIER, seconds)
            return _NOTHING

        self._in_order(run, False)

    @overload
    def broadcast(
        self,
        x: torch.Tensor,
        root: int,
        *,
        out: torch.Tensor | None = None,
        timeout: Timeout | Unset = UNSET,
        async_op: Literal[False] = False,
    ) -> torch.Tensor: ...

    @overload
    def broadcast(
        self,
        x: torch.Tensor,
        root: int,
        *,
        out: torch.Tensor | None = None,
        timeout: Timeout | Unset = UNSET,
        async_op: Literal[True],
    ) -> Work: ...

    def broadcast(
        self,
        x: torch.Tensor,
        root: int,
        *,
        out: torch.Tensor | None = None,
        timeout: Timeout | Unset = UNSET,
        async_op: bool = False,
    ) -> torch.Tensor | Work:
        """Give every rank the tensor of rank `root`. **Collective.**

        Args:
            x: of one shape and dtype on every rank; its values count on the root only.
            root: rank within the group.
            out: where the result goes; may be x.
            timeout: seconds, a profile or None.
            async_op: return a `Work`.

        Raises:
            ConfigError: on this rank only, when an argument is wrong; nothing was sent.
            CapabilityError: when there is no process group to carry it out.
            CollectiveMismatchError, PeerLostError, PeerTimeoutError, GroupClosedError: see `all_reduce`.
        """
        check_tensor("broadcast", x, self.world_size > 1)
        check_rank("broadcast", "root", root, self.world_size)
        call = CallDescription("broadcast", dtype_name(x.dtype), tuple(x.shape), root=root)

        def move(result: torch.Tensor, seconds: float | None) -> None:
            result.copy_(x)
            self._torch(call).broadcast(result, root, seconds)

        return self._carry_out(call, x, out, tuple(x.shape), move, timeout, async_op)

    @overload
    def all_gather_single(
        self,
        x: torch.Tensor,
        *,
        out: torch.Tensor | None = None,
        timeout: Timeout | Unset = UNSET,
        async_op: Literal[False] = False,
    ) -> torch.Tensor: ...

    @overload
    def all_gather_single(
        self,
        x: torch.Tensor,
        *,
        out: torch.Tensor | None = None,
        timeout: Timeout | Unset = UNSET,
        async_op: Literal[True],
    ) -> Work: ...

    def all_gather_single(
        self,
        x: torch.Tensor,
        *,
        out: torch.Tensor | None = None,
        timeout: Timeout | Unset = UNSET,
        async_op: bool = False,
    ) -> torch.Tensor | Work:
        """Give every rank all ranks' tensors, one after another along dim 0. **Collective.**

        Args:
            x: [N, ...] of one shape and dtype on every rank, at least one dimension.
            out: [W * N, ...], where the result goes.
            timeout: seconds, a profile or None.
            async_op: return a `Work`.

        Raises:
            ConfigError, CapabilityError, CommError: as for `broadcast`.
        """
        check_tensor("all_gather_single", x, self.world_size > 1)
        if x.dim() == 0:
            raise ConfigError(
                "all_gather_single of a 0-d tensor has no dimension to gather along; reshape(1)"
            )
        call = CallDescription("all_gather_single", dtype_name(x.dtype), tuple(x.shape))
        shape = (self.world_size * x.shape[0], *x.shape[1:])

        def move(result: torch.Tensor, seconds: float | None) -> None:
            self._torch(call).all_gather(x.contiguous(), result, seconds)

        return self._carry_out(call, x, out, shape, move, timeout, async_op)

    @overload
    def reduce_scatter_single(
        self,
        x: torch.Tensor,
        op: object = "sum",
        *,
        out: torch.Tensor | None = None,
        timeout: Timeout | Unset = UNSET,
        async_op: Literal[False] = False,
    ) -> torch.Tensor: ...

    @overload
    def reduce_scatter_single(
        self,
        x: torch.Tensor,
        op: object = "sum",
        *,
        out: torch.Tensor | None = None,
        timeout: Timeout | Unset = UNSET,
        async_op: Literal[True],
    ) -> Work: ...

    def reduce_scatter_single(
        self,
        x: torch.Tensor,
        op: object = "sum",
        *,
        out: torch.Tensor | None = None,
        timeout: Timeout | Unset = UNSET,
        async_op: bool = False,
    ) -> torch.Tensor | Work:
        """Reduce x over the ranks and give each rank its part of dim 0. **Collective.**

        Args:
            x: [W * N, ...] of one shape and dtype on every rank.
            op: reduce operation, as for `all_reduce`.
            out: [N, ...], where the result goes.
            timeout: seconds, a profile or None.
            async_op: return a `Work`.

        Raises:
            ConfigError, CapabilityError, CommError: as for `broadcast`.
        """
        check_tensor("reduce_scatter_single", x, self.world_size > 1)
        reduce = reduce_op_name(op)
        refuse_integer_average(reduce, x.dtype)
        if x.dim() == 0 or x.shape[0] % self.world_size:
            raise ConfigError(
                f"reduce_scatter_single of {list(x.shape)}: dim 0 does not divide by {self.world_size} ranks"
            )
        call = CallDescription("reduce_scatter_single", dtype_name(x.dtype), tuple(x.shape), reduce)
        shape = (x.shape[0] // self.world_size, *x.shape[1:])

        def move(result: torch.Tensor, seconds: float | None) -> None:
            self._torch(call).reduce_scatter(x.contiguous(), result, reduce, seconds)

        return self._carry_out(call, x, out, shape, move, timeout, async_op)

    @overload
    def all_to_all_single(
        self,
        x: torch.Tensor,
        send_splits: Sequence[int] | None = None,
        recv_splits: Sequence[int] | None = None,
        *,
        out: torch.Tensor | None = None,
        timeout: Timeout | Unset = UNSET,
        async_op: Literal[False] = False,
    ) -> torch.Tensor: ...

    @overload
    def all_to_all_single(
        self,
        x: torch.Tensor,
        send_splits: Sequence[int] | None = None,
        recv_splits: Sequence[int] | None = None,
        *,
        out: torch.Tensor | None = None,
        timeout: Timeout | Unset = UNSET,
        async_op: Literal[True],
    ) -> Work: ...

    def all_to_all_single(
        self,
        x: torch.Tensor,
        send_splits: Sequence[int] | None = None,
        recv_splits: Sequence[int] | None = None,
        *,
        out: torch.Tensor | None = None,
        timeout: Timeout | Unset = UNSET,
        async_op: bool = False,
    ) -> torch.Tensor | Work:
        """Send rows of x to each rank, in rank order, and receive each rank's rows. **Collective.**

        Args:
            x: [N, ...]; dimensions after the first are alike on every rank.
            send_splits: rows for each rank, adding up to N; equal parts where None.
            recv_splits: rows from each rank; equal parts where both are None.
            out: [sum(recv_splits), ...], where the result goes.
            timeout: seconds, a profile or None.
            async_op: return a `Work`.

        Raises:
            ConfigError, CapabilityError, CommError: as for `broadcast`.
            CollectiveMismatchError: also when one rank sends what another does not expect; names the pair.
        """
        check_tensor("all_to_all_single", x, self.world_size > 1)
        if x.dim() == 0:
            raise ConfigError("all_to_all_single of a 0-d tensor has no rows; reshape(1)")
        sends = check_splits("send_splits", send_splits, x.shape[0], self.world_size)
        if recv_splits is None and send_splits is not None:
            raise ConfigError("send_splits without recv_splits; give both, or neither for equal parts")
        rows = x.shape[0] if recv_splits is None else _total(recv_splits)
        recvs = check_splits("recv_splits", recv_splits, rows, self.world_size)
        call = CallDescription(
            "all_to_all_single",
            dtype_name(x.dtype),
            tuple(x.shape[1:]),
            send_splits=sends,
            recv_splits=recvs,
        )

        def move(result: torch.Tensor, seconds: float | None) -> None:
            self._torch(call).all_to_all(x.contiguous(), result, sends, recvs, seconds)

        return self._carry_out(call, x, out, (rows, *x.shape[1:]), move, timeout, async_op)

    def _torch(self, call: CallDescription) -> TorchFallback:
        self._refuse_foreign()
        if self._fallback is None:
            raise CapabilityError(
                f"{call.op} of group {self.name!r} needs torch.distributed, and there is no process group "
                "behind this communicator; make it from one"
            )
        return self._fallback

    def _carry_out(
        self,
        call: CallDescription,
        x: torch.Tensor,
        out: torch.Tensor | None,
        shape: tuple[int, ...],
        move: Callable[[torch.Tensor, float | None], None],
        timeout: Timeout | Unset,
        async_op: bool,
    ) -> torch.Tensor | Work:
        """Agree on the call, then move the data into a contiguous result."""
        if out is not None:
            check_out(call.op, x, out, shape)
        if self.world_size > 1:
            self._torch(call)
        seconds = self._seconds(timeout)

        def run() -> torch.Tensor:
            calls = self._agreement.agree(call, seconds)
            if call.send_splits:
                self._refuse_unequal_splits(calls)
            in_place = out is not None and out.is_contiguous()
            result = (
                out if in_place and out is not None else torch.empty(shape, dtype=x.dtype, device=x.device)
            )
            if self.world_size == 1:
                result.copy_(x.view(shape) if x.is_contiguous() else x.reshape(shape))
            else:
                move(result, seconds)
            return result if out is None or in_place else out.copy_(result)

        return self._in_order(run, async_op)

    def _refuse_unequal_splits(self, calls: Sequence[CallDescription]) -> None:
        unequal = refuse_unequal_splits(calls)
        if unequal:
            raise CollectiveMismatchError(
                f"all_to_all_single of group {self.name!r}: " + "; ".join(unequal),
                group=self.name,
                op="all_to_all_single",
                seq=self._agreement.seq,
                rank=self.rank,
                peers=sorted({rank for pair in find_unequal_splits(calls) for rank in pair}),
            )


def _total(splits: Sequence[int]) -> int:
    try:
        return sum(operator.index(split) for split in splits)
    except TypeError:
        raise ConfigError(f"recv_splits={splits!r} has entries that are no integers") from None


_BARRIER = CallDescription("barrier")
_NOTHING = torch.empty(0)
