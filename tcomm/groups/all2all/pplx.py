"""A manager whose handle has PPLX's methods, over the low-latency exchange."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from tcomm.errors import UsageError
from tcomm.groups.all2all.base import All2AllManagerBase
from tcomm.groups.all2all.cache import Cache
from tcomm.groups.all2all.surroundings import Coordinator
from tcomm.groups.moe.low_latency import LowLatency
from tcomm.groups.moe.low_latency_calls import LowLatencyHandle
from tcomm.groups.moe.members import members_of
from tcomm.groups.moe.workspace import Hook
from tcomm.groups.setup import Membership
from tcomm.groups.stateless.group import StatelessProcessGroup

__all__ = ["AllToAll", "PPLXAll2AllManager", "Sizes"]

_ALIGNMENT = 16
_SUMMED = (torch.bfloat16, torch.float16, torch.float32)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What an exchange is made for: the same on every rank, but for `rank`.

    Raises:
        UsageError: when bytes are no multiple of 16, or numbers do not divide.
    """

    max_num_tokens: int
    """Tokens that ranks which share them dispatch at once, at most."""
    num_experts: int
    """Of all ranks."""
    experts_per_token: int
    """The most."""
    rank: int
    """This one."""
    world_size: int
    """Ranks."""
    dp_size: int
    """Ranks in a row that share their tokens: a TP group."""
    hidden_dim: int
    """Channels."""
    hidden_dim_bytes: int
    """Bytes of a dispatched token."""
    hidden_dim_scale_bytes: int
    """Bytes of its scales."""
    group_name: str = ""
    """Of no influence."""

    def __post_init__(self) -> None:
        for name in ("hidden_dim_bytes", "hidden_dim_scale_bytes"):
            if getattr(self, name) % _ALIGNMENT:
                raise UsageError(f"{name}={getattr(self, name)} is no multiple of {_ALIGNMENT}")
        if self.dp_size < 1 or self.world_size % self.dp_size or self.num_experts % self.world_size:
            raise UsageError(
                f"dp_size={self.dp_size} has to divide the {self.world_size} ranks, and those the "
                f"{self.num_experts} experts"
            )

    @property
    def num_dispatchers(self) -> int:
        """Sets of ranks that share tokens."""
        return self.world_size // self.dp_size

    @property
    def max_share(self) -> int:
        """Tokens that one of the ranks that share them dispatches, at most."""
        return -(-self.max_num_tokens // self.dp_size)

    def shares(self, num_tokens: int) -> list[int]:
        """How ranks divide the tokens that they share."""
        each, more = divmod(num_tokens, self.dp_size)
        return [each + (rank < more) for rank in range(self.dp_size)]


@dataclasses.dataclass
class _Sent:
    """A dispatch on its way, or received and not combined."""

    begin: int
    """The first token of this rank's share."""
    shares: list[int]
    """Of the ranks that share the tokens."""
    topk_idx: torch.Tensor
    """[share, k] int64."""
    received: torch.Tensor
    """[E / R, slots, packed row]."""
    counts: torch.Tensor
    """[E / R] int32."""
    handle: LowLatencyHandle
    """For the way back."""
    hook: Hook | None
    """Receives; None once it did."""
    has_scales: bool
    """Whether rows end with scales."""


class AllToAll:
    """Dispatch to experts and combine, of a fixed capacity, each in two phases. **Collective** to use.

    Ranks that share their tokens divide the work, and then give one another the results. A row travels with
    its scales as one; where the results are wider than that, it is padded to their width.

    Args:
        members: all ranks.
        sizes: what it is made for.
        sharing: the ranks that share their tokens; None where nobody does.
    """

    def __init__(self, members: Membership, sizes: Sizes, sharing: Coordinator | None) -> None:
        self.sizes = sizes
        self._members = members
        self._sharing = sharing
        self._engine: LowLatency | None = None
        self._sent: _Sent | None = None
        self._combined: tuple[torch.Tensor, Hook | None] | None = None

    def dispatch(
        self,
        out_expert_num_tokens: torch.Tensor,
        out_expert_x: torch.Tensor,
        out_expert_x_scale: torch.Tensor | None,
        dp_x: torch.Tensor,
        dp_x_scale: torch.Tensor | None,
        indices: torch.Tensor,
        bound_m: torch.Tensor | None = None,
        do_send: bool = True,
        do_recv: bool = True,
    ) -> None:
        """Send tokens to the owners of their experts, or receive them, or both. **Collective.**

        Args:
            out_expert_num_tokens: [E / R] int32, written: valid rows of each expert.
            out_expert_x: [E / R, M * dispatchers, H] of the type of dp_x, written.
            out_expert_x_scale: [E / R, M * dispatchers, at least n] of that of dp_x_scale, written; or None.
            dp_x: [T, H], T at most M.
            dp_x_scale: [T, n], or None.
            indices: [T, k] integers: experts.
            bound_m: how many of the T tokens count; None: all.
            do_send: the first phase.
            do_recv: the second phase.

        Raises:
            UsageError: when there are too many tokens, sizes do not fit, or phases come in another order.
            ConfigError, CommError: as `LowLatency.dispatch` does.
        """
        if do_send:
            self._send(dp_x, dp_x_scale, indices, bound_m)
        if do_recv:
            self._receive(out_expert_num_tokens, out_expert_x, out_expert_x_scale)

    def _send(
        self, x: torch.Tensor, scale: torch.Tensor | None, indices: torch.Tensor, bound_m: torch.Tensor | None
    ) -> None:
        sizes = self.sizes
        num_tokens = len(x) if bound_m is None else int(bound_m)
        if num_tokens > min(len(x), sizes.max_num_tokens) or len(indices) < num_tokens:
            raise UsageError(
                f"{num_tokens} tokens of {len(x)} rows and {len(indices)} indices; the exchange is for "
                f"{sizes.max_num_tokens}"
            )
        if self._sent is not None:
            raise UsageError("a dispatch is under way; combine it first")
        engine = self._open(x)
        shares = sizes.shares(num_tokens)
        place = sizes.rank % sizes.dp_size
        begin = sum(shares[:place])
        mine = slice(begin, begin + shares[place])
        rows = self._pack(x[mine], None if scale is None else scale[mine], engine)
        topk_idx = indices[mine].to(torch.int64)
        received, counts, handle, hook = engine.dispatch(rows, topk_idx, use_fp8=False, return_recv_hook=True)
        assert isinstance(received, torch.Tensor)
        self._sent = _Sent(begin, shares, topk_idx, received, counts, handle, hook, scale is not None)

    def _receive(self, num_tokens: torch.Tensor, out: torch.Tensor, out_scale: torch.Tensor | None) -> None:
        sent = self._sent
        if sent is None or sent.hook is None:
            raise UsageError("nothing was sent that could be received; call dispatch with do_send first")
        if sent.has_scales != (out_scale is not None):
            raise UsageError("out_expert_x_scale goes with dp_x_scale: give both or none")
        sent.hook()
        sent.hook = None
        num_tokens.copy_(sent.counts)
        raw = sent.received.view(torch.uint8)[:, : out.shape[1]]
        nbytes = out.shape[2] * out.itemsize
        out.copy_(raw[..., :nbytes].view(out.dtype))
        if out_scale is not None:
            begin = self.sizes.hidden_dim_bytes
            words = min(out_scale.shape[2], self.sizes.hidden_dim_scale_bytes // out_scale.itemsize)
            scales = raw[..., begin : begin + words * out_scale.itemsize]
            out_scale[..., :words].copy_(scales.contiguous().view(out_scale.dtype))

    def combine(
        self,
        out_tokens: torch.Tensor,
        indices: torch.Tensor,
        weights: torch.Tensor,
        expert_y: torch.Tensor,
        bound_m: torch.Tensor | None = None,
        do_send: bool = True,
        do_recv: bool = True,
    ) -> None:
        """Give the experts' rows back, or sum them up by weight, or both. **Collective.**

        Args:
            out_tokens: [at least T, H], written; of a type like expert_y's.
            indices: [T, k]: of the dispatch.
            weights: [T, k] float32.
            expert_y: [E / R, M * dispatchers, H] bfloat16, or what was dispatched without scales.
            bound_m: of the dispatch; of no influence.
            do_send: the first phase.
            do_recv: the second phase.

        Raises:
            UsageError: when phases come in another order, or sizes do not fit.
            ConfigError, CommError: as `LowLatency.combine` does.
        """
        del indices, bound_m
        if do_send:
            self._give_back(weights, expert_y)
        if do_recv:
            self._sum_up(out_tokens)

    def _give_back(self, weights: torch.Tensor, y: torch.Tensor) -> None:
        sent, engine = self._sent, self._engine
        if sent is None or engine is None or sent.hook is not None or self._combined is not None:
            raise UsageError("nothing was received that could be combined; call dispatch first")
        if y.dtype != engine.dtype or y.shape[2] != self.sizes.hidden_dim:
            raise UsageError(
                f"expert_y is {y.dtype} {list(y.shape)}; give rows of {self.sizes.hidden_dim} {engine.dtype}"
            )
        lent = engine.next_combine_buffer(sent.handle)
        lent[:, : y.shape[1], : y.shape[2]] = y[:, : lent.shape[1]]
        mine = weights[sent.begin : sent.begin + len(sent.topk_idx)].to(torch.float32)
        self._combined = engine.combine(
            lent, sent.topk_idx, mine, sent.handle, zero_copy=True, return_recv_hook=True
        )

    def _sum_up(self, out: torch.Tensor) -> None:
        if self._combined is None or self._sent is None:
            raise UsageError(
                "nothing was given back that could be summed up; call combine with do_send first"
            )
        (rows, hook), shares = self._combined, self._sent.shares
        if len(out) < sum(shares):
            raise UsageError(f"out_tokens has {len(out)} rows for {sum(shares)} tokens")
        self._combined = self._sent = None
        if hook is not None:
            hook()
        rows = rows[:, : self.sizes.hidden_dim].contiguous()
        if self._sharing is not None:
            rows = self._sharing.all_gatherv(rows, 0, shares)
        out[: sum(shares)] = rows

    def _open(self, x: torch.Tensor) -> LowLatency:
        """The exchange, of a width that takes a row with its scales, and a result. **Collective** once."""
        sizes = self.sizes
        if x.dim() != 2 or x.shape[1] * x.itemsize != sizes.hidden_dim_bytes:
            raise UsageError(
                f"dp_x is {x.dtype} {list(x.shape)}, hidden_dim_bytes={sizes.hidden_dim_bytes} a token"
            )
        if self._engine is None:
            dtype = x.dtype if x.dtype in _SUMMED else torch.bfloat16
            nbytes = max(
                sizes.hidden_dim_bytes + sizes.hidden_dim_scale_bytes, sizes.hidden_dim * dtype.itemsize
            )
            hidden = -(-nbytes // (8 * dtype.itemsize)) * 8
            self._engine = LowLatency(
                self._members, sizes.max_share, hidden, sizes.num_experts,
                max_topk=sizes.experts_per_token, dtype=dtype, device=x.device,
            )  # fmt: skip
        return self._engine

    def _pack(self, x: torch.Tensor, scale: torch.Tensor | None, engine: LowLatency) -> torch.Tensor:
        """[T, width of the exchange]: rows, and scales behind them."""
        if scale is None and x.dtype == engine.dtype and x.shape[1] == engine.layout.hidden:
            return x.contiguous()
        nbytes = engine.layout.hidden * engine.dtype.itemsize
        packed = torch.zeros(len(x), nbytes, dtype=torch.uint8, device=x.device)
        at = self.sizes.hidden_dim_bytes
        packed[:, :at] = x.contiguous().view(torch.uint8)
        if scale is not None:
            raw = scale.contiguous().view(torch.uint8)
            if raw.shape[1] > self.sizes.hidden_dim_scale_bytes:
                raise UsageError(
                    f"dp_x_scale has {raw.shape[1]} bytes a token, hidden_dim_scale_bytes="
                    f"{self.sizes.hidden_dim_scale_bytes}"
                )
            packed[:, at : at + raw.shape[1]] = raw
        return packed.view(engine.dtype)

    def destroy(self) -> None:
        """Give the memory back. Not collective; may be called twice."""
        engine, self._engine = self._engine, None
        self._sent = self._combined = None
        if engine is not None:
            engine.close()


class PPLXAll2AllManager(All2AllManagerBase):
    """`get_handle(kwargs)` gives an `AllToAll`. **Collective** to create.

    Args:
        cpu_group: the ranks that experts are spread over.
        tcp_store_group: as for the base.
    """

    def __init__(
        self,
        cpu_group: dist.ProcessGroup | StatelessProcessGroup,
        tcp_store_group: StatelessProcessGroup | None = None,
    ) -> None:
        super().__init__(cpu_group, tcp_store_group)
        self.handle_cache = Cache()

    def get_handle(self, kwargs: Mapping[str, Any]) -> AllToAll:
        """The exchange, the same one for the same arguments while somebody keeps it.

        Args:
            kwargs: the fields of `Sizes`.

        Raises:
            UsageError: when they do not fit one another or the group.
            TypeError: when one is missing, or another is given.
        """
        handle: AllToAll = self.handle_cache.get_or_create(kwargs, self._make)
        return handle

    def _make(self, **kwargs: Any) -> AllToAll:
        sizes = Sizes(**kwargs)
        if (sizes.rank, sizes.world_size) != (self.rank, self.world_size):
            raise UsageError(
                f"rank {sizes.rank} of {sizes.world_size}; this is rank {self.rank} of {self.world_size}"
            )
        sharing = self.tp_group if sizes.dp_size > 1 else None
        if sharing is not None and sharing.world_size != sizes.dp_size:
            raise UsageError(f"dp_size={sizes.dp_size}, where {sharing.world_size} TP ranks share tokens")
        return AllToAll(members_of(self.cpu_group, "moe/pplx"), sizes, sharing)

    def destroy(self) -> None:
        """Destroy the exchanges that are still kept, and forget them. Not collective; may be called twice."""
        for handle in self.handle_cache.alive():
            handle.destroy()
        self.handle_cache.clear()
