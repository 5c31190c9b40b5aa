"""Exchange of tokens by one side alone: rows are pushed into their rank's workspace, results are pulled."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from tcomm.cpu import moe_one_sided as on_host
from tcomm.errors import ConfigError, UsageError
from tcomm.groups.arguments import UNSET, Timeout, Unset, dtype_name
from tcomm.groups.moe.expert_ids import MOST_ROWS, check_divides
from tcomm.groups.moe.routes import Routes, as_word_rows, make_routes
from tcomm.groups.moe.token_checks import check_placed
from tcomm.groups.moe.workspace import Workspace
from tcomm.groups.setup import Membership
from tcomm.signature import CallDescription

__all__ = ["MOST_PAYLOADS", "OneSided", "OneSidedLayout"]

MOST_PAYLOADS = 8
"""Tensors that a token may travel with; each begins at a cache line."""
_ALIGNMENT = 128
_SUMMED = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class OneSidedLayout:
    """What lies in a rank's workspace: ``[ counts | dispatched rows | rows to combine ]``, in bytes."""

    world_size: int
    max_num_tokens: int
    """Tokens of a rank."""
    dispatch_nbytes_per_token: int
    """All payloads of a token together."""
    combine_nbytes_per_token: int
    """A row to combine."""

    @property
    def dispatch_at(self) -> int:
        """Behind two sets of counts, one for each parity."""
        return _padded(2 * self.world_size * 8)

    @property
    def combine_at(self) -> int:
        """Behind R * M rows of all payloads."""
        rows = self.world_size * self.max_num_tokens * self.dispatch_nbytes_per_token
        return self.dispatch_at + _padded(rows) + MOST_PAYLOADS * _ALIGNMENT

    @property
    def nbytes(self) -> int:
        """Of all together."""
        rows = self.world_size * self.max_num_tokens * self.combine_nbytes_per_token
        return self.combine_at + _padded(rows)

    def offsets(self, row_nbytes: Sequence[int], runtime_max: int) -> list[int]:
        """Where the [R, runtime_max, *] rows of each payload begin."""
        found, at = [], self.dispatch_at
        for nbytes in row_nbytes:
            found.append(at)
            at += _padded(self.world_size * runtime_max * nbytes)
        return found


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


@dataclasses.dataclass(frozen=True)
class _Dispatched:
    """What combine has to know of the dispatch before it."""

    routes: Routes
    received: torch.Tensor
    runtime_max: int


class OneSided:
    """A workspace on every rank that others write into and read from. **Collective** to create.

    A dispatch is followed by a combine. What it gives lies in this rank's workspace until then, so that one
    result is alive at a time.

    Args:
        members: who takes part.
        max_num_tokens: of a rank, at most.
        top_k: experts of a token.
        num_experts: of all ranks; rank r holds those from `r * num_experts / R` on.
        dispatch_nbytes_per_token: of all payloads together, at most.
        combine_nbytes_per_token: of a row to combine, at most.
        timeout: of waits: seconds, a profile, or None: as long as the peers live.
        device: of the tokens.
        engine: see `Workspace`.

    Raises:
        ConfigError: when an argument is wrong.
        CapabilityError, RendezvousError, GroupMismatchError: as `Workspace` does.
    """

    def __init__(
        self,
        members: Membership,
        max_num_tokens: int,
        top_k: int,
        num_experts: int,
        dispatch_nbytes_per_token: int,
        combine_nbytes_per_token: int,
        *,
        timeout: Timeout | Unset = UNSET,
        device: torch.device | str = "cpu",
        engine: str = "",
    ) -> None:
        world_size = members.exchange.world_size
        _check_sizes(
            max_num_tokens=max_num_tokens,
            top_k=top_k,
            dispatch_nbytes_per_token=dispatch_nbytes_per_token,
            combine_nbytes_per_token=combine_nbytes_per_token,
        )
        check_divides(num_experts, world_size)
        self.layout = OneSidedLayout(
            world_size, max_num_tokens, dispatch_nbytes_per_token, combine_nbytes_per_token
        )
        self.top_k = top_k
        self.num_experts = num_experts
        # Regions are fixed, and lie across both halves: a dispatch and a combine take turns.
        self.workspace = Workspace(
            members, -(-self.layout.nbytes // 2), timeout=timeout, device=device, engine=engine
        )
        self._engine: Any = on_host
        if self.workspace.engine == "triton":
            from tcomm.kernels import moe_one_sided

            self._engine = moe_one_sided
        self._dispatched: _Dispatched | None = None

    @property
    def is_dispatched(self) -> bool:
        """Whether a dispatch waits for its combine."""
        return self._dispatched is not None

    def dispatch(
        self,
        token_selected_experts: torch.Tensor,
        payloads: Sequence[torch.Tensor],
        runtime_max: int,
        *,
        invalid_token_expert_id: int | None = None,
        timeout: Timeout | Unset = UNSET,
    ) -> list[torch.Tensor]:
        """Give each token's rows to every rank that holds an expert of it, once. **Collective.**

        Args:
            token_selected_experts: [T, k] int32 or int64, global ids; -1: no selection.
            payloads: [T, *] each, any dtype, contiguous; the same kinds on every rank. T may differ.
            runtime_max: rows of a source in the result, at least T and at most M; the same on every rank.
            invalid_token_expert_id: written over the rows that nobody sent of `token_selected_experts`, which
                must be among the payloads; None: they stay as they are, undefined.
            timeout: as for the constructor.

        Returns:
            [R, runtime_max, *] for each payload, in this rank's workspace: in block s tokens of rank s, in
            order, and behind them undefined rows. They may be read until `combine` is called.

        Raises:
            UsageError: when the last dispatch was not combined, or runtime_max does not fit.
            ConfigError: when another argument is wrong; names the token of an expert that does not exist.
            CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
        """
        result: list[torch.Tensor] = self.workspace.run(
            lambda: self._dispatch(
                token_selected_experts, payloads, runtime_max, invalid_token_expert_id, timeout
            )
        )
        return result

    def _dispatch(
        self,
        ids: torch.Tensor,
        payloads: Sequence[torch.Tensor],
        runtime_max: int,
        invalid: int | None,
        timeout: Timeout | Unset,
    ) -> list[torch.Tensor]:
        if self._dispatched is not None:
            raise UsageError("dispatch was called twice; combine what the last one gave, then dispatch")
        rows = self._check_payloads(ids, payloads, runtime_max)
        ids_at = _position_of(ids, payloads, invalid) if invalid is not None else -1
        routes = make_routes(ids, self.num_experts, self.workspace.world_size)
        told = [f"{dtype_name(one.dtype)}{list(one.shape[1:])}" for one in payloads]
        contents = f"{', '.join(told)} for {self.num_experts} experts"
        call = self._call("one_sided_dispatch", (runtime_max, self.top_k), contents)
        offsets = self.layout.offsets([one.shape[1] * one.itemsize for one in rows], runtime_max)
        self.workspace.drain()
        received = self._engine.dispatch(
            rows, offsets, routes.tables, runtime_max, self.workspace.arena, call,
            self.workspace.seconds(timeout),
        )  # fmt: skip
        self._account(routes, sum(one.shape[1] * one.itemsize for one in rows))
        self._dispatched = _Dispatched(routes, received, runtime_max)
        views = [
            self._view(offset, (runtime_max, *one.shape[1:]), one.dtype)
            for offset, one in zip(offsets, payloads, strict=True)
        ]
        if invalid is not None:
            places = torch.arange(runtime_max, device=received.device)
            views[ids_at].masked_fill_((places >= received[:, None])[:, :, None], invalid)
        return views

    def combine_buffer(self, hidden: int, dtype: torch.dtype) -> torch.Tensor:
        """The workspace memory of the rows to combine, to be filled in place of a copy.

        Args:
            hidden: elements of a row.
            dtype: of the rows.

        Returns:
            [R, runtime_max, hidden], undefined; for `combine` with `payload_in_workspace`.

        Raises:
            UsageError: when nothing was dispatched.
            ConfigError: when it is no row, or a longer one than there is room for.
        """
        dispatched = self._take_dispatched("combine_buffer")
        if type(hidden) is not int or hidden < 0 or not isinstance(dtype, torch.dtype):
            raise ConfigError(
                f"combine_buffer({hidden!r}, {dtype!r}); give elements of a row and their dtype"
            )
        self._check_row(hidden * dtype.itemsize)
        return self._view(self.layout.combine_at, (dispatched.runtime_max, hidden), dtype)

    def combine(
        self,
        payload: torch.Tensor,
        runtime_max: int,
        *,
        payload_in_workspace: bool = False,
        timeout: Timeout | Unset = UNSET,
    ) -> torch.Tensor:
        """Add up what the ranks made of each token. **Collective.**

        Args:
            payload: [R, runtime_max, H] float32, bfloat16 or float16, contiguous: a row for each row that
                was dispatched here; others are not read.
            runtime_max: as it was for `dispatch`.
            payload_in_workspace: it is what `combine_buffer` gave, and is not copied.
            timeout: as for the constructor.

        Returns:
            [T, H] of the dtype of payload: sums in fp32, in the order in which the ranks first appear among a
            token's experts; 0 for a token without any.

        Raises:
            UsageError: when nothing was dispatched, or with another runtime_max, or the payload is not the
                workspace's.
            ConfigError: when the payload is of another kind.
            CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait. After a mismatch, the
                dispatch can still be combined.
        """
        result: torch.Tensor = self.workspace.run(
            lambda: self._combine(payload, runtime_max, payload_in_workspace, timeout)
        )
        return result

    def _combine(
        self, payload: torch.Tensor, runtime_max: int, in_workspace: bool, timeout: Timeout | Unset
    ) -> torch.Tensor:
        dispatched = self._take_dispatched("combine")
        routes = dispatched.routes
        if runtime_max != dispatched.runtime_max:
            raise UsageError(
                f"combine of runtime_max={runtime_max} after dispatch of {dispatched.runtime_max}"
            )
        self._check_results(payload, runtime_max, in_workspace)
        hidden = payload.shape[2]
        out = payload.new_empty(len(routes.ranks), hidden)
        call = self._call("one_sided_combine", (runtime_max, hidden), f"{dtype_name(payload.dtype)} rows")
        self._engine.combine(
            None if in_workspace else payload, out, self.layout.combine_at, routes.tables,
            dispatched.received, runtime_max, self.workspace.arena, call, self.workspace.seconds(timeout),
        )  # fmt: skip
        self._account(routes, hidden * payload.itemsize)
        self._dispatched = None
        return out

    def close(self) -> None:
        """Give the workspace back. Not collective; may be called twice."""
        self.workspace.close()

    def _call(self, op: str, shape: tuple[int, ...], contents: str) -> CallDescription:
        return CallDescription(op, "rows", shape, contents=contents, algorithm=self.workspace.engine)

    def _view(self, offset: int, tail: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        space = self.workspace
        return space.view(space.rank, 0, offset, (space.world_size, *tail), dtype)

    def _account(self, routes: Routes, row_nbytes: int) -> None:
        traffic = self.workspace.traffic
        traffic.num_phases += 1
        if self.workspace.device.type == "cpu":
            traffic.wire_nbytes += routes.num_remote(self.workspace.rank) * row_nbytes

    def _take_dispatched(self, verb: str) -> _Dispatched:
        if self._dispatched is None:
            raise UsageError(f"{verb} was called before dispatch; there is nothing to combine")
        return self._dispatched

    def _check_payloads(
        self, ids: torch.Tensor, payloads: Sequence[torch.Tensor], runtime_max: int
    ) -> list[torch.Tensor]:
        """The payloads as rows of words."""
        limit = self.layout.max_num_tokens
        if type(runtime_max) is not int or not 0 < runtime_max <= limit:
            raise UsageError(
                f"runtime_max={runtime_max!r}: the workspace has room for 1 to {limit} tokens a rank"
            )
        check_placed("token_selected_experts", ids, self.workspace.device)
        if ids.dim() != 2 or ids.shape[1] != self.top_k:
            raise ConfigError(f"token_selected_experts is {list(ids.shape)}; needed [tokens, {self.top_k}]")
        if len(ids) > runtime_max:
            raise UsageError(f"{len(ids)} tokens are more than runtime_max={runtime_max}")
        if not isinstance(payloads, list | tuple):
            raise ConfigError(f"payloads is a {type(payloads).__name__}; give a list of tensors")
        if len(payloads) > MOST_PAYLOADS:
            raise ConfigError(f"{len(payloads)} payloads; a token travels with at most {MOST_PAYLOADS}")
        for index, one in enumerate(payloads):
            check_placed(f"payload {index}", one, self.workspace.device)
            if one.dim() < 1 or len(one) != len(ids) or not one.is_contiguous():
                raise ConfigError(
                    f"payload {index} is {list(one.shape)}; needed contiguous [{len(ids)}, ...]"
                )
        rows = [as_word_rows(one) for one in payloads]
        nbytes = sum(one.shape[1] * one.itemsize for one in rows)
        if nbytes > self.layout.dispatch_nbytes_per_token:
            raise ConfigError(
                f"payloads of {nbytes} bytes a token; the workspace has room for "
                f"{self.layout.dispatch_nbytes_per_token}"
            )
        return rows

    def _check_results(self, payload: torch.Tensor, runtime_max: int, in_workspace: bool) -> None:
        check_placed("payload of combine", payload, self.workspace.device)
        wanted = (self.workspace.world_size, runtime_max)
        if payload.dim() != 3 or payload.shape[:2] != wanted or not payload.is_contiguous():
            raise ConfigError(
                f"payload of combine is {list(payload.shape)}; needed contiguous {[*wanted, 'hidden']}"
            )
        if payload.dtype not in _SUMMED:
            raise ConfigError(f"combine adds up {', '.join(map(dtype_name, _SUMMED))}, not {payload.dtype}")
        self._check_row(payload.shape[2] * payload.itemsize)
        own = self._view(self.layout.combine_at, (runtime_max, payload.shape[2]), payload.dtype)
        if in_workspace and payload.data_ptr() != own.data_ptr():
            raise UsageError("payload_in_workspace: the payload is not what combine_buffer() gave")

    def _check_row(self, nbytes: int) -> None:
        if nbytes > self.layout.combine_nbytes_per_token:
            raise ConfigError(
                f"rows of {nbytes} bytes to combine; the workspace has room for "
                f"{self.layout.combine_nbytes_per_token}"
            )


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if type(size) is not int or size <= 0:
            raise ConfigError(f"{name}={size!r} is not a positive number")


def _position_of(ids: torch.Tensor, payloads: Sequence[torch.Tensor], invalid: object) -> int:
    if type(invalid) is not int or not -MOST_ROWS <= invalid < MOST_ROWS:
        raise ConfigError(f"invalid_token_expert_id={invalid!r} is no integer of 32 bits")
    for index, one in enumerate(payloads):
        if one is ids:
            return index
    raise ConfigError(
        "invalid_token_expert_id is written into the ids that travel, and token_selected_experts is not "
        "among the payloads; add it"
    )
