"""Verbs that reduce: all-reduce, reduce, reduce-scatter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Unpack, overload

import torch

from tcomm.errors import ConfigError
from tcomm.groups.arguments import UNSET, Timeout, Unset, check_dim, check_sizes, check_tensor
from tcomm.groups.collective import CallOptions, Collective
from tcomm.groups.packing import Packing, Split, result_tensors
from tcomm.groups.work import Work

__all__ = ["Reductions"]


class Reductions(Collective):
    """Reducing verbs of a communicator. Same bits on every rank, whatever the algorithm."""

    @overload
    def all_reduce(
        self, x: torch.Tensor, op: object = "sum", *, async_op: Literal[True], **options: Unpack[CallOptions]
    ) -> Work: ...

    @overload
    def all_reduce(
        self,
        x: torch.Tensor,
        op: object = "sum",
        *,
        async_op: Literal[False] = False,
        **options: Unpack[CallOptions],
    ) -> torch.Tensor: ...

    def all_reduce(
        self,
        x: torch.Tensor,
        op: object = "sum",
        *,
        out: torch.Tensor | None = None,
        timeout: Timeout | Unset = UNSET,
        async_op: bool = False,
        algorithm: str = "",
    ) -> Any:
        """Reduce x over the ranks, the same bits on every rank. **Collective.**

        Meaning: `tcomm.reference.all_reduce`. The algorithm is that of `explain`.

        Args:
            x: any shape and stride, 0-d and empty included; not modified unless it is `out`.
            op: `sum`, `avg`, `max`, `min`, or a `torch.distributed.ReduceOp`.
            out: where the result goes, of the shape and dtype of x; may be x.
            timeout: seconds, a profile, or None: as long as the peers live.
            async_op: return a `Work` at once; x and out belong to it until it is complete.
            algorithm: engine, algorithm or `engine:algorithm` that must be used, on every rank.

        Returns:
            `out`, or a tensor like x; with `async_op`, a `Work` that gives it.

        Raises:
            ConfigError: on this rank only, when an argument is wrong; nothing was sent.
            CapabilityError: when the algorithm that is asked for cannot do it.
            CollectiveMismatchError: on every rank, when they call different things; the group stays usable.
            PeerLostError, PeerTimeoutError: when a peer does not come; the group is given up.
            GroupClosedError: when the group is closed or belongs to another process.
        """
        return self._collect("all_reduce", (op,), x, out, timeout, async_op, algorithm)

    @overload
    def reduce(
        self,
        x: torch.Tensor,
        root: int,
        op: object = "sum",
        *,
        async_op: Literal[True],
        **options: Unpack[CallOptions],
    ) -> Work: ...

    @overload
    def reduce(
        self,
        x: torch.Tensor,
        root: int,
        op: object = "sum",
        *,
        async_op: Literal[False] = False,
        **options: Unpack[CallOptions],
    ) -> torch.Tensor | None: ...

    def reduce(
        self,
        x: torch.Tensor,
        root: int,
        op: object = "sum",
        *,
        out: torch.Tensor | None = None,
        timeout: Timeout | Unset = UNSET,
        async_op: bool = False,
        algorithm: str = "",
    ) -> Any:
        """Reduce x over the ranks into rank `root`: the bits of an all-reduce. **Collective.**

        Args:
            x: of one shape and dtype on every rank.
            root: rank within the group.
            op: as for `all_reduce`.
            out: where the result goes on the root, may be x; ignored elsewhere.
            timeout: as for `all_reduce`.
            async_op: as for `all_reduce`.
            algorithm: as for `all_reduce`.

        Returns:
            The result on the root, None elsewhere.

        Raises:
            ConfigError, CapabilityError, CommError: as `all_reduce` does.
        """
        return self._collect("reduce", (root, op), x, out, timeout, async_op, algorithm)

    @overload
    def reduce_scatter_single(
        self,
        x: torch.Tensor,
        op: object = "sum",
        *,
        dim: int = 0,
        async_op: Literal[True],
        **options: Unpack[CallOptions],
    ) -> Work: ...

    @overload
    def reduce_scatter_single(
        self,
        x: torch.Tensor,
        op: object = "sum",
        *,
        dim: int = 0,
        async_op: Literal[False] = False,
        **options: Unpack[CallOptions],
    ) -> torch.Tensor: ...

    def reduce_scatter_single(
        self,
        x: torch.Tensor,
        op: object = "sum",
        *,
        dim: int = 0,
        out: torch.Tensor | None = None,
        timeout: Timeout | Unset = UNSET,
        async_op: bool = False,
        algorithm: str = "",
    ) -> Any:
        """Reduce x over the ranks and give each rank its part along `dim`. **Collective.**

        Meaning: `tcomm.reference.reduce_scatter`. Nothing is padded.

        Args:
            x: [..., W * N, ...] of one shape and dtype on every rank.
            op: as for `all_reduce`.
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
        return self._collect("reduce_scatter_single", (op, dim), x, out, timeout, async_op, algorithm)

    def reduce_scatterv(
        self,
        x: torch.Tensor | Sequence[torch.Tensor],
        sizes: Sequence[int],
        op: object = "sum",
        *,
        dim: int = 0,
        out: Any = None,
        timeout: Timeout | Unset = UNSET,
        async_op: bool = False,
        algorithm: str = "",
    ) -> Any:
        """Reduce x over the ranks and give rank `r` its `sizes[r]` rows along `dim`. **Collective.**

        Args:
            x: [..., sum(sizes), ...] of one shape and dtype on every rank; or several such tensors, of one
                dtype, that share `sizes` and travel together.
            sizes: rows of each rank, the same on every rank; 0 is fine.
            op: as for `all_reduce`.
            dim: along which it is taken apart; may be negative.
            out: [..., sizes[rank], ...], where the result goes; for several tensors, one each.
            timeout: as for `all_reduce`.
            async_op: as for `all_reduce`.
            algorithm: as for `all_reduce`.

        Returns:
            `out`, or a new tensor; a list of them for several.

        Raises:
            ConfigError: also when `sizes` does not add up to x.
            CapabilityError, CommError: as `all_reduce` does.
        """
        lengths = check_sizes("sizes of reduce_scatterv", sizes, self.world_size)
        if isinstance(x, Sequence):
            return self._reduce_scatter_many(x, lengths, op, dim, out, timeout, async_op, algorithm)
        return self._collect("reduce_scatterv", (lengths, op, dim), x, out, timeout, async_op, algorithm)

    def _reduce_scatter_many(
        self,
        xs: Sequence[torch.Tensor],
        lengths: tuple[int, ...],
        op: object,
        dim: int,
        outs: Any,
        timeout: Timeout | Unset,
        async_op: bool,
        algorithm: str,
    ) -> Any:
        for x in xs:
            check_tensor("reduce_scatterv", x, self.world_size > 1)
        if len({x.dtype for x in xs}) != 1:
            raise ConfigError("reduce_scatterv takes one tensor, or several of one dtype, and at least one")
        splits, mine = [], []
        for x in xs:
            at = check_dim("reduce_scatterv", x.shape, dim)
            if x.shape[at] != sum(lengths):
                raise ConfigError(
                    f"reduce_scatterv: sizes={list(lengths)} adds up to {sum(lengths)}, a tensor of shape "
                    f"{list(x.shape)} has {x.shape[at]} along dim {at}"
                )
            part = (*x.shape[:at], lengths[self.rank], *x.shape[at + 1 :])
            splits.append(Split(tuple(x.shape), x.dtype, at, lengths))
            mine.append(Split(part, x.dtype, at, (lengths[self.rank],)))
        results = result_tensors("reduce_scatterv", xs, outs, [split.shape for split in mine])
        whole, part_of_mine = Packing(splits, False), Packing(mine, False)

        def run() -> Any:
            if self.world_size == 1:
                # Gradients flow through its copies, and would not through packing.
                each = zip(xs, results, strict=True)
                return [self._run("reduce_scatterv", (lengths, op, dim), x, y, timeout, "") for x, y in each]
            args = (whole.sizes, op, 0)
            packed, told = whole.pack(xs), whole.contents
            flat = self._run("reduce_scatterv", args, packed, None, timeout, algorithm, told)
            part_of_mine.unpack(flat, results)
            return results

        return self._in_order(run, async_op)
