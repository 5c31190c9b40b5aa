"""Exchange of tokens by both sides: the sender waits for credits, the receiver gives them back."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from tcomm.cpu import moe_two_sided as on_host
from tcomm.errors import ConfigError, UsageError
from tcomm.groups.arguments import UNSET, Timeout, Unset, dtype_name
from tcomm.groups.moe.expert_ids import MOST_ROWS, check_divides
from tcomm.groups.moe.routes import Routes, as_word_rows, make_routes
from tcomm.groups.moe.token_checks import check_placed
from tcomm.groups.moe.workspace import Workspace
from tcomm.groups.setup import Membership
from tcomm.memory.rings import RingLayout
from tcomm.signature import CallDescription

__all__ = ["RoutingInfo", "TwoSided"]

_SLOT_NBYTES = 64 * 1024
_MOST_LANES = 4
_MOST_RINGS = 32
_SUMMED = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True, eq=False)
class RoutingInfo:
    """What `alltoallv` and `combine` have to know of a routing; any number of them may be alive."""

    exchange: TwoSided
    """Which made it."""
    number: int
    """Of the `prepare` that made it: the same on every rank."""
    routes: Routes
    """Where this rank's tokens go."""
    received: torch.Tensor
    """[R] int64: rows from each rank."""
    max_num_tokens: int
    """Of a rank, at most."""
    places: torch.Tensor
    """[R, max_num_tokens] int64: the entry, `token * k + j`, of each copy that goes to a rank, in order."""
    rows: torch.Tensor
    """[R, max_num_tokens] int64: the row that each copy from a rank becomes."""

    @property
    def num_tokens(self) -> int:
        """This rank's tokens."""
        return len(self.routes.ranks)

    @property
    def top_k(self) -> int:
        """Experts of a token."""
        return self.routes.ranks.shape[1]

    @property
    def num_rows(self) -> int:
        """Rows of what is received, with those that nobody sends."""
        return self.max_num_tokens * len(self.received)


class TwoSided:
    """Rings between every two ranks, whose memory does not depend on any number of tokens.

    **Collective** to create.

    Args:
        members: who takes part.
        num_nbytes: of the rings of one rank; None: 4 slots of 64 KiB for each rank and lane.
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
        *,
        num_nbytes: int | None = None,
        timeout: Timeout | Unset = UNSET,
        device: torch.device | str = "cpu",
        engine: str = "",
    ) -> None:
        world_size = members.exchange.world_size
        on_gpu = torch.device(device).type == "cuda"
        lanes = max(1, min(_MOST_LANES, _MOST_RINGS // world_size)) if on_gpu else 1
        if num_nbytes is None:
            self.layout = RingLayout(world_size, lanes, _SLOT_NBYTES)
        elif type(num_nbytes) is not int or num_nbytes <= 0:
            raise ConfigError(f"num_nbytes={num_nbytes!r} is not a positive number of bytes")
        else:
            self.layout = RingLayout.within(num_nbytes, world_size, lanes)
        self.workspace = Workspace(
            members, -(-self.layout.nbytes // 2), timeout=timeout, device=device, engine=engine
        )
        self._engine: Any = on_host
        if self.workspace.engine == "triton":
            from tcomm.kernels import moe_two_sided

            self._engine = moe_two_sided
        self._prepared = 0

    def prepare(
        self,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int,
        num_experts: int,
        *,
        timeout: Timeout | Unset = UNSET,
    ) -> tuple[RoutingInfo, torch.Tensor, torch.Tensor]:
        """Tell every rank what it will get: how many rows, and their experts and weights. **Collective.**

        Args:
            topk_ids: [T, k] int32, global ids of experts; -1: no selection.
            topk_weights: [T, k] float32.
            max_num_tokens: of a rank, at most; the same on every rank.
            num_experts: of all ranks; rank r holds those from `r * num_experts / R` on.
            timeout: as for the constructor.

        Returns:
            The routing, ids [max_num_tokens * R, k] int32 and weights [max_num_tokens * R, k] float32 of the
            rows that come here, ordered by source rank. Ids of experts that other ranks hold, and those of
            rows that nobody sends, are `num_experts`, and their weights 0.

        Raises:
            ConfigError: when an argument is wrong; names the token of an expert that does not exist.
            UsageError: when there are more tokens than max_num_tokens.
            CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the waits.
        """
        return self.workspace.run(
            lambda: self._prepare(topk_ids, topk_weights, max_num_tokens, num_experts, timeout)
        )

    def _prepare(
        self, ids: torch.Tensor, weights: torch.Tensor, most: int, num_experts: int, timeout: Timeout | Unset
    ) -> tuple[RoutingInfo, torch.Tensor, torch.Tensor]:
        space = self.workspace
        _check_routing(ids, weights, most, space)
        check_divides(num_experts, space.world_size)
        routes = make_routes(ids, num_experts, space.world_size)
        top_k = ids.shape[1]
        call = self._call("two_sided_prepare", (most, top_k), f"tokens for {num_experts} experts")
        space.drain()
        received = self._engine.announce(routes.counts, space.arena, call, space.seconds(timeout))
        space.traffic.num_phases += 1
        self._prepared += 1
        places, rows_of = _places(routes, most), _rows(received, most)
        info = RoutingInfo(self, self._prepared, routes, received, most, places, rows_of)
        both = torch.cat([ids, weights.view(torch.int32)], dim=1)
        rows = self._to_experts(both, info, timeout)
        held = num_experts // space.world_size
        first = space.rank * held
        sent = torch.arange(info.num_rows, device=ids.device) < received.sum()
        theirs, their_weights = rows[:, :top_k], rows[:, top_k:].view(torch.float32)
        ours = sent[:, None] & (theirs >= first) & (theirs < first + held)
        return info, torch.where(ours, theirs, num_experts), torch.where(ours, their_weights, 0.0)

    def alltoallv(
        self, x: torch.Tensor, info: RoutingInfo, *, timeout: Timeout | Unset = UNSET
    ) -> torch.Tensor:
        """Give each token's row to every rank that holds an expert of it, once. **Collective.**

        Args:
            x: [T, *] of any dtype, contiguous; the same kind on every rank.
            info: of `prepare`; may be used any number of times.
            timeout: as for the constructor.

        Returns:
            [max_num_tokens * R, *]: the rows that come here, first those of rank 0, each rank's in token
            order; behind them undefined rows.

        Raises:
            ConfigError: when x is of another shape.
            UsageError: when info is of another exchange.
            CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the waits.
        """
        return self.workspace.run(lambda: self._to_experts(x, info, timeout))

    def _to_experts(self, x: torch.Tensor, info: RoutingInfo, timeout: Timeout | Unset) -> torch.Tensor:
        self._check_info("alltoallv", info)
        self._check_rows("alltoallv", x, info.num_tokens)
        out = x.new_empty(info.num_rows, *x.shape[1:])
        tokens = info.places // info.top_k
        given, taken = (tokens, info.routes.counts), (info.rows, info.received)
        self._exchange("two_sided_alltoallv", x, out, info, given, taken, timeout)
        return out

    def combine(
        self, x: torch.Tensor, info: RoutingInfo, top_k: int, *, timeout: Timeout | Unset = UNSET
    ) -> torch.Tensor:
        """Add up what the ranks made of each token. **Collective.**

        Args:
            x: [max_num_tokens * R, H] float32, bfloat16 or float16, contiguous: rows as `alltoallv` gave
                them; those that nobody sent are not read.
            info: of `prepare`.
            top_k: experts of a token.
            timeout: as for the constructor.

        Returns:
            [T, H] of the dtype of x: sums in fp32, in the order in which the ranks first appear among a
            token's experts; 0 for a token without any.

        Raises:
            ConfigError: when x is of another shape or dtype, or top_k is another.
            UsageError: when info is of another exchange.
            CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the waits.
        """
        return self.workspace.run(lambda: self._combine(x, info, top_k, timeout))

    def _combine(
        self, x: torch.Tensor, info: RoutingInfo, top_k: int, timeout: Timeout | Unset
    ) -> torch.Tensor:
        self._check_info("combine", info)
        self._check_rows("combine", x, info.num_rows)
        if type(top_k) is not int or top_k != info.top_k:
            raise ConfigError(f"top_k={top_k!r} of combine; the tokens have {info.top_k} experts")
        if x.dim() != 2 or x.dtype not in _SUMMED:
            names = ", ".join(map(dtype_name, _SUMMED))
            raise ConfigError(f"combine adds up [rows, hidden] of {names}, not {x.dtype} {list(x.shape)}")
        scattered = x.new_zeros(info.num_tokens * top_k, x.shape[1])
        given, taken = (info.rows, info.received), (info.places, info.routes.counts)
        self._exchange("two_sided_combine", x, scattered, info, given, taken, timeout)
        slots = scattered.view(info.num_tokens, top_k, x.shape[1])
        total = torch.zeros_like(slots[:, 0], dtype=torch.float32)
        for entry in range(top_k):
            total += slots[:, entry]
        return total.to(x.dtype)

    def close(self) -> None:
        """Give the rings back. Not collective; may be called twice."""
        self.workspace.close()

    def _call(self, op: str, shape: tuple[int, ...], contents: str) -> CallDescription:
        return CallDescription(op, "rows", shape, contents=contents, algorithm=self.workspace.engine)

    def _exchange(
        self,
        op: str,
        x: torch.Tensor,
        out: torch.Tensor,
        info: RoutingInfo,
        given: tuple[torch.Tensor, torch.Tensor],
        taken: tuple[torch.Tensor, torch.Tensor],
        timeout: Timeout | Unset,
    ) -> None:
        space = self.workspace
        contents = f"{dtype_name(x.dtype)} rows of prepare #{info.number}"
        call = self._call(op, (info.max_num_tokens, *x.shape[1:]), contents)
        rows, out_rows = as_word_rows(x), as_word_rows(out)
        space.drain()
        self._engine.exchange_rows(
            rows, out_rows, given, taken, self.layout, space.arena, call, space.seconds(timeout)
        )
        if out.numel() and out_rows.data_ptr() != out.data_ptr():
            out.copy_(out_rows.view(out.dtype).view(out.shape))
        space.traffic.num_phases += 1
        if space.device.type == "cpu":
            # Counted by the side that sends.
            num_remote = int(given[1].sum() - given[1][space.rank])
            space.traffic.wire_nbytes += num_remote * rows.shape[1] * rows.itemsize

    def _check_info(self, verb: str, info: RoutingInfo) -> None:
        if not isinstance(info, RoutingInfo) or info.exchange is not self:
            raise UsageError(f"{verb}: the routing is of another exchange; call prepare() of this one")

    def _check_rows(self, verb: str, x: torch.Tensor, num_rows: int) -> None:
        check_placed(f"x of {verb}", x, self.workspace.device)
        if x.dim() < 1 or len(x) != num_rows or not x.is_contiguous():
            raise ConfigError(f"{verb} of {list(x.shape)}; needed contiguous [{num_rows}, ...]")


def _check_routing(ids: torch.Tensor, weights: torch.Tensor, most: int, space: Workspace) -> None:
    check_placed("topk_ids", ids, space.device)
    check_placed("topk_weights", weights, space.device)
    if ids.dim() != 2 or ids.dtype != torch.int32 or not ids.shape[1]:
        raise ConfigError(f"topk_ids are {ids.dtype} {list(ids.shape)}; needed int32 [tokens, top_k]")
    if weights.dtype != torch.float32 or weights.shape != ids.shape or not weights.is_contiguous():
        raise ConfigError(
            f"topk_weights are {weights.dtype} {list(weights.shape)}; "
            f"needed contiguous float32 {list(ids.shape)}"
        )
    if type(most) is not int or not 0 < most * space.world_size < MOST_ROWS:
        raise ConfigError(f"max_num_tokens={most!r} is not a positive number of 32 bits for all ranks")
    if len(ids) > most:
        raise UsageError(f"{len(ids)} tokens are more than max_num_tokens={most}")


def _places(routes: Routes, most: int) -> torch.Tensor:
    """[R, most]: entries `token * k + j` of the copies for each rank, in order; 0 behind them."""
    world_size, ranks = len(routes.counts), routes.ranks
    entries = torch.arange(ranks.numel(), device=ranks.device)
    beyond = world_size * most
    where = torch.where(ranks >= 0, ranks * most + routes.slots, beyond).flatten()
    table = torch.zeros(beyond + 1, dtype=torch.int64, device=ranks.device).scatter_(0, where, entries)
    return table[:beyond].view(world_size, most)


def _rows(received: torch.Tensor, most: int) -> torch.Tensor:
    """[R, most]: one row after another, without gaps between ranks."""
    first = received.cumsum(0) - received
    return first[:, None] + torch.arange(most, device=received.device)
