"""Verbs that hand data out: broadcast, scatter, all-to-all; and the barrier, which hands out nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Unpack, overload

import torch

from tcomm.errors import CollectiveMismatchError, ConfigError
from tcomm.groups.arguments import (
    NOTHING,
    UNSET,
    Timeout,
    Unset,
    check_dim,
    check_out,
    check_rank,
    check_sizes,
    check_splits,
    check_tensor,
    dtype_name,
    find_unequal_splits,
    refuse_unequal_splits,
)
from tcomm.groups.collective import CallOptions, Collective
from tcomm.groups.work import Work
from tcomm.signature import CallDescription

__all__ = ["Transfers"]


class Transfers(Collective):
    """Verbs of a communicator by which data goes out. Data of any dtype only moves."""

    def barrier(
        self, *, timeout: Timeout | Unset = UNSET, async_op: bool = False, algorithm: str = ""
    ) -> Work | None:
        """Return when every rank has called it. **Collective.**

        Args:
            timeout: seconds, a profile, or None: as long as the peers live.
            async_op: return a `Work` at once, which is complete when every rank has called it.
            algorithm: engine, algorithm or both that must be used, on every rank.

        Raises:
            CollectiveMismatchError, PeerLostError, PeerTimeoutError, GroupClosedError: as `all_reduce` does.
        """
        done = self._collect("barrier", (), NOTHING, NOTHING, timeout, async_op, algorithm)
        return done if isinstance(done, Work) else None

    @overload
    def broadcast(
        self, x: torch.Tensor, root: int, *, async_op: Literal[True], **options: Unpack[CallOptions]
    ) -> Work: ...

    @overload
    def broadcast(
        self,
        x: torch.Tensor,
        root: int,
        *,
        async_op: Literal[False] = False,
        **options: Unpack[CallOptions],
    ) -> torch.Tensor: ...

    def broadcast(
        self,
        x: torch.Tensor,
        root: int,
        *,
        out: torch.Tensor | None = None,
        timeout: Timeout | Unset = UNSET,
        async_op: bool = False,
        algorithm: str = "",
    ) -> Any:
        """Give every rank the tensor of rank `root`. **Collective.**

        Args:
            x: of one shape and dtype on every rank; its values count on the root only.
            root: rank within the group.
            out: where the result goes; may be x.
            timeout: as for `all_reduce`.
            async_op: as for `all_reduce`.
            algorithm: as for `all_reduce`.

        Returns:
            `out`, or a new tensor.

        Raises:
            ConfigError, CapabilityError, CommError: as `all_reduce` does.
        """
        return self._collect("broadcast", (root,), x, out, timeout, async_op, algorithm)

    @overload
    def scatter(
        self,
        x: torch.Tensor | None,
        root: int,
        *,
        dim: int = 0,
        async_op: Literal[True],
        **options: Unpack[CallOptions],
    ) -> Work: ...

    @overload
    def scatter(
        self,
        x: torch.Tensor | None,
        root: int,
        *,
        dim: int = 0,
        async_op: Literal[False] = False,
        **options: Unpack[CallOptions],
    ) -> torch.Tensor: ...

    def scatter(
        self,
        x: torch.Tensor | None,
        root: int,
        *,
        dim: int = 0,
        out: torch.Tensor | None = None,
        timeout: Timeout | Unset = UNSET,
        async_op: bool = False,
        algorithm: str = "",
    ) -> Any:
        """Give each rank its part, along `dim`, of the tensor of rank `root`. **Collective.**

        Args:
            x: [..., W * N, ...] on the root. Elsewhere its values do not count, and it may be None when
                `out` tells shape and dtype.
            root: rank within the group.
            dim: along which it is taken apart; may be negative.
            out: [..., N, ...], where the result goes.
            timeout: as for `all_reduce`.
            async_op: as for `all_reduce`.
            algorithm: as for `all_reduce`.

        Returns:
            `out`, or a new tensor.

        Raises:
            ConfigError: also when `dim` does not divide by the number of ranks.
            CapabilityError, CommError: as `all_reduce` does.
        """
        check_rank("scatter", "root", root, self.world_size)
        if x is None:
            if self.rank == root or out is None:
                raise ConfigError("scatter without x: the root has to give x, and the others x or out=")
            check_tensor("scatter", out)
            at = check_dim("scatter", out.shape, dim)
            shape = [*out.shape[:at], out.shape[at] * self.world_size, *out.shape[at + 1 :]]
            # Memory that nobody touches, and not the pool's, which calls of other threads may be using.
            x = torch.empty(shape, dtype=out.dtype, device=out.device)
        return self._collect("scatter", (root, dim), x, out, timeout, async_op, algorithm)

    @overload
    def all_to_all_single(
        self,
        x: torch.Tensor,
        send_splits: Sequence[int] | None = None,
        recv_splits: Sequence[int] | None = None,
        *,
        async_op: Literal[True],
        **options: Unpack[CallOptions],
    ) -> Work: ...

    @overload
    def all_to_all_single(
        self,
        x: torch.Tensor,
        send_splits: Sequence[int] | None = None,
        recv_splits: Sequence[int] | None = None,
        *,
        async_op: Literal[False] = False,
        **options: Unpack[CallOptions],
    ) -> torch.Tensor: ...

    def all_to_all_single(
        self,
        x: torch.Tensor,
        send_splits: Sequence[int] | None = None,
        recv_splits: Sequence[int] | None = None,
        *,
        out: torch.Tensor | None = None,
        timeout: Timeout | Unset = UNSET,
        async_op: bool = False,
        algorithm: str = "",
    ) -> Any:
        """Send rows of x to each rank, in rank order, and receive each rank's rows. **Collective.**

        Meaning: `tcomm.reference.all_to_all`. With splits the ranks compare them first, which costs a
        barrier; a rank that gives none while another does is another call.

        Args:
            x: [N, ...]; dimensions after the first are alike on every rank.
            send_splits: rows for each rank, adding up to N; equal parts where None.
            recv_splits: rows from each rank. Where None, equal parts, or with `send_splits` whatever the
                others send; `out` cannot be given then.
            out: [sum(recv_splits), ...], where the result goes; may be x when all parts are equal.
            timeout: as for `all_reduce`.
            async_op: as for `all_reduce`.
            algorithm: as for `all_reduce`.

        Returns:
            `out`, or a new tensor.

        Raises:
            ConfigError, CapabilityError, CommError: as `all_reduce` does.
            CollectiveMismatchError: also when one rank sends what another does not expect; names the pair.
        """
        if send_splits is None and recv_splits is None:
            return self._collect("all_to_all_single", (), x, out, timeout, async_op, algorithm)
        check_tensor("all_to_all_single", x, self.world_size > 1)
        if x.dim() == 0:
            raise ConfigError("all_to_all_single of a 0-d tensor has no rows; reshape(1)")
        sends = check_splits("send_splits", send_splits, x.shape[0], self.world_size)
        recvs: tuple[int, ...] = ()
        if recv_splits is not None:
            recvs = check_sizes("recv_splits", recv_splits, self.world_size)
            if out is not None:
                check_out("all_to_all_single", x, out, (sum(recvs), *x.shape[1:]), False)
        elif out is not None:
            raise ConfigError(
                "all_to_all_single cannot check out= without recv_splits=; give both, or neither"
            )
        self._refuse_algorithm("all_to_all_single", x, algorithm)
        call = CallDescription(
            "all_to_all_single", dtype_name(x.dtype), tuple(x.shape[1:]), send_splits=sends, recv_splits=recvs
        )

        def run() -> Any:
            counts = self._row_matrix(call, timeout)
            return self._run("all_to_all_ragged", (counts,), x, out, timeout, algorithm)

        return self._in_order(run, async_op)

    def _row_matrix(self, call: CallDescription, timeout: Timeout | Unset) -> tuple[tuple[int, ...], ...]:
        """Rows that each rank sends to each, once all expect what is sent. **Collective.**"""
        calls = self._agreement.agree(call, self._seconds(timeout))
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
        return tuple(theirs.send_splits for theirs in calls)
