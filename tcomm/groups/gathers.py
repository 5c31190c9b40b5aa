"""Verbs that put tensors together: all-gather, of equal and unequal parts, and gather."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Unpack, overload

import torch

from tcomm.errors import ConfigError
from tcomm.groups.arguments import UNSET, Timeout, Unset, check_dim, check_sizes, check_tensor
from tcomm.groups.collective import CallOptions, Collective
from tcomm.groups.packing import Packing, Split, describe_kinds, result_tensors
from tcomm.groups.work import Work
from tcomm.signature import CallDescription

__all__ = ["Gathers"]


class Gathers(Collective):
    """Gathering verbs of a communicator. Data of any dtype only moves."""

    @overload
    def all_gather_single(
        self, x: torch.Tensor, *, dim: int = 0, async_op: Literal[True], **options: Unpack[CallOptions]
    ) -> Work: ...

    @overload
    def all_gather_single(
        self,
        x: torch.Tensor,
        *,
        dim: int = 0,
        async_op: Literal[False] = False,
        **options: Unpack[CallOptions],
    ) -> torch.Tensor: ...

    def all_gather_single(
        self,
        x: torch.Tensor,
        *,
        dim: int = 0,
        out: torch.Tensor | None = None,
        timeout: Timeout | Unset = UNSET,
        async_op: bool = False,
        algorithm: str = "",
    ) -> Any:
        """Give every rank all ranks' tensors, one after another along `dim`. **Collective.**

        Meaning: `tcomm.reference.all_gather`.

        Args:
            x: [..., N, ...] of one shape and dtype on every rank, at least one dimension.
            dim: along which they are put together; may be negative.
            out: [..., W * N, ...], where the result goes.
            timeout: as for `all_reduce`.
            async_op: as for `all_reduce`.
            algorithm: as for `all_reduce`.

        Returns:
            `out`, or a new tensor.

        Raises:
            ConfigError, CapabilityError, CommError: as `all_reduce` does.
        """
        return self._collect("all_gather_single", (dim,), x, out, timeout, async_op, algorithm)

    @overload
    def gather(
        self,
        x: torch.Tensor,
        root: int,
        *,
        dim: int = 0,
        async_op: Literal[True],
        **options: Unpack[CallOptions],
    ) -> Work: ...

    @overload
    def gather(
        self,
        x: torch.Tensor,
        root: int,
        *,
        dim: int = 0,
        async_op: Literal[False] = False,
        **options: Unpack[CallOptions],
    ) -> torch.Tensor | None: ...

    def gather(
        self,
        x: torch.Tensor,
        root: int,
        *,
        dim: int = 0,
        out: torch.Tensor | None = None,
        timeout: Timeout | Unset = UNSET,
        async_op: bool = False,
        algorithm: str = "",
    ) -> Any:
        """Give rank `root` all ranks' tensors, one after another along `dim`. **Collective.**

        Args:
            x: [..., N, ...] of one shape and dtype on every rank, at least one dimension.
            root: rank within the group.
            dim: along which they are put together; may be negative.
            out: [..., W * N, ...], where the result goes on the root; ignored elsewhere.
            timeout: as for `all_reduce`.
            async_op: as for `all_reduce`.
            algorithm: as for `all_reduce`.

        Returns:
            The result on the root, None elsewhere.

        Raises:
            ConfigError, CapabilityError, CommError: as `all_reduce` does.
        """
        return self._collect("gather", (root, dim), x, out, timeout, async_op, algorithm)

    def all_gatherv(
        self,
        x: torch.Tensor | Sequence[torch.Tensor],
        sizes: Sequence[int] | None = None,
        *,
        dim: int = 0,
        out: Any = None,
        timeout: Timeout | Unset = UNSET,
        async_op: bool = False,
        algorithm: str = "",
    ) -> Any:
        """Give every rank all ranks' tensors, whose lengths along `dim` may differ. **Collective.**

        Args:
            x: [..., sizes[rank], ...], otherwise of one shape and dtype on every rank; or several such
                tensors, of any dtypes, that share `sizes` and travel together.
            sizes: rows of every rank, the same on every rank; 0 is fine. Where None, the ranks tell one
                another first, which costs a barrier; `out` cannot be given then.
            dim: along which they are put together; may be negative.
            out: [..., sum(sizes), ...], where the result goes; for several tensors, one each.
            timeout: as for `all_reduce`.
            async_op: as for `all_reduce`.
            algorithm: as for `all_reduce`.

        Returns:
            `out`, or a new tensor; a list of them for several.

        Raises:
            ConfigError: also when x has not `sizes[rank]` rows.
            CapabilityError, CommError: as `all_reduce` does.
        """
        many = list(x) if isinstance(x, Sequence) else [x]
        at = self._check_rows(many, sizes, dim, out, algorithm)
        if isinstance(x, torch.Tensor) and sizes is not None:
            lengths = check_sizes("sizes of all_gatherv", sizes, self.world_size)
            return self._collect("all_gatherv", (lengths, dim), x, out, timeout, async_op, algorithm)

        def run() -> Any:
            lengths = self._row_counts(many, at, timeout) if sizes is None else tuple(sizes)
            if isinstance(x, torch.Tensor):
                return self._run("all_gatherv", (lengths, dim), x, None, timeout, algorithm)
            return self._all_gather_many(many, lengths, at, out, timeout, algorithm)

        return self._in_order(run, async_op)

    def _check_rows(
        self,
        xs: Sequence[torch.Tensor],
        sizes: Sequence[int] | None,
        dim: int,
        out: object,
        algorithm: str,
    ) -> list[int]:
        """Dimension of each tensor along which it is gathered."""
        if not xs:
            raise ConfigError("all_gatherv takes one tensor or several, and at least one")
        if sizes is None and out is not None:
            raise ConfigError("all_gatherv cannot check out= without sizes=; give both, or neither")
        for x in xs:
            check_tensor("all_gatherv", x, self.world_size > 1)
            self._refuse_algorithm("all_gatherv", x, algorithm)
        at = [check_dim("all_gatherv", x.shape, dim) for x in xs]
        rows = [x.shape[d] for x, d in zip(xs, at, strict=True)]
        if sizes is not None:
            needed = check_sizes("sizes of all_gatherv", sizes, self.world_size)[self.rank]
        else:
            needed = rows[0]
        if any(count != needed for count in rows):
            raise ConfigError(
                f"all_gatherv on rank {self.rank}: tensors have {rows} rows, needed {needed} of each"
            )
        return at

    def _row_counts(
        self, xs: Sequence[torch.Tensor], at: Sequence[int], timeout: Timeout | Unset
    ) -> tuple[int, ...]:
        """Rows of every rank, asked for. **Collective.**"""
        each = zip(xs, at, strict=True)
        kinds = describe_kinds((x.dtype, [*x.shape[:d], -1, *x.shape[d + 1 :]]) for x, d in each)
        call = CallDescription("all_gatherv", contents=kinds, dim=at[0], send_splits=(xs[0].shape[at[0]],))
        return tuple(theirs.send_splits[0] for theirs in self._agreement.agree(call, self._seconds(timeout)))

    def _all_gather_many(
        self,
        xs: Sequence[torch.Tensor],
        sizes: tuple[int, ...],
        at: Sequence[int],
        outs: Sequence[torch.Tensor] | None,
        timeout: Timeout | Unset,
        algorithm: str,
    ) -> list[torch.Tensor]:
        wholes = [(*x.shape[:d], sum(sizes), *x.shape[d + 1 :]) for x, d in zip(xs, at, strict=True)]
        results = result_tensors("all_gatherv", xs, outs, wholes)
        if self.world_size == 1:
            # Gradients flow through its copies, and would not through packing.
            each = zip(xs, at, results, strict=True)
            return [self._run("all_gatherv", (sizes, d), x, y, timeout, "") for x, d, y in each]
        mine = Packing(
            [Split(tuple(x.shape), x.dtype, d, (x.shape[d],)) for x, d in zip(xs, at, strict=True)], True
        )
        whole = Packing(
            [Split(shape, x.dtype, d, sizes) for shape, x, d in zip(wholes, xs, at, strict=True)], True
        )
        args, packed = (whole.sizes, 0), mine.pack(xs)
        flat = self._run("all_gatherv", args, packed, None, timeout, algorithm, whole.contents)
        whole.unpack(flat, results)
        return results
