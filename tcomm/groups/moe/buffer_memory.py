"""The memory of a buffer: what it is made of, made when it is needed, and given back."""

from __future__ import annotations

import contextlib
import weakref
from typing import ClassVar

import torch
import torch.distributed as dist

from tcomm.errors import CapabilityError, ConfigError, UsageError
from tcomm.groups.arguments import UNSET, Timeout, Unset
from tcomm.groups.moe.buffer_config import check_nbytes
from tcomm.groups.moe.high_throughput import HighThroughput
from tcomm.groups.moe.low_latency import LowLatency, size_hint
from tcomm.groups.moe.low_latency_masks import Masks
from tcomm.groups.moe.members import members_of
from tcomm.groups.stateless.group import StatelessProcessGroup
from tcomm.groups.stateless.same_node import place_of

__all__ = ["BufferMemory"]

_Key = tuple[int, int, int] | None
_Group = dist.ProcessGroup | StatelessProcessGroup


class BufferMemory:
    """Memory of two protocols, each made at its first call. **Collective** to create.

    Args:
        group: the ranks, in which experts are spread evenly.
        num_nvl_bytes: of the high-throughput exchange, on each rank; a multiple of 128.
        num_rdma_bytes: of the low-latency exchange; at least `get_low_latency_rdma_size_hint` says.
        low_latency_mode: whether there is a low-latency exchange.
        num_qps_per_rank: of no influence.
        allow_nvlink_for_low_latency_mode: of no influence; ranks share memory.
        allow_mnnvl: of no influence.
        explicitly_destroy: the memory stays until `destroy()`; else it goes with the object.
        enable_shrink: whether low-latency exchanges go on without ranks that are lost; else they are over.
        comm: none; a communicator of MPI is no group here.
        timeout: of calls: seconds, a profile, or None: as long as the peers live.
        engine: `cpu`, or `triton` for kernels; empty: what suits the device.

    Attributes:
        group, num_nvl_bytes, num_rdma_bytes, low_latency_mode, enable_shrink, explicitly_destroy: as given.
        rank, group_size: in the group.

    Raises:
        UsageError: an `AssertionError`; when a size makes no sense.
        CapabilityError: when `comm` is given.
    """

    num_sms: ClassVar[int] = 20
    """Processors that exchanges may use, of all buffers."""

    def __init__(  # noqa: PLR0913
        self,
        group: _Group,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: object | None = None,
        *,
        timeout: Timeout | Unset = UNSET,
        engine: str = "",
    ) -> None:
        del num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl
        if comm is not None:
            raise CapabilityError("a Buffer is made of a process group; communicators of MPI are not taken")
        if not isinstance(group, dist.ProcessGroup | StatelessProcessGroup):
            raise ConfigError(f"group={group!r} of a Buffer is no process group that this rank is in")
        check_nbytes("num_nvl_bytes", num_nvl_bytes)
        check_nbytes("num_rdma_bytes", num_rdma_bytes)
        self.group = group
        self.rank, self.group_size = place_of(group)
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.enable_shrink = low_latency_mode, enable_shrink
        self.explicitly_destroy = explicitly_destroy
        self._timeout, self._engine = timeout, engine
        self._engines: dict[_Key, HighThroughput | LowLatency] = {}
        self._is_destroyed = False
        if not explicitly_destroy:
            weakref.finalize(self, _close, self._engines)

    def high_throughput(self, device: torch.device) -> HighThroughput:
        """The exchange for many tokens. **Collective** at the first call.

        Args:
            device: of the tokens.

        Raises:
            UsageError: when there is no memory for it, or it was given back.
        """
        self._refuse_destroyed()
        found = self._engines.get(None)
        if found is None:
            if not self.num_nvl_bytes:
                raise UsageError("a Buffer with num_nvl_bytes=0 has no memory for dispatch and combine")
            members = members_of(self.group, "moe/high_throughput")
            found = self._engines[None] = HighThroughput(
                members, self.num_nvl_bytes, timeout=self._timeout, device=device, engine=self._engine
            )
        assert isinstance(found, HighThroughput)
        return found

    def low_latency(self, max_tokens: int, hidden: int, num_experts: int, device: torch.device) -> LowLatency:
        """The exchange for few tokens, of a capacity. **Collective** at the first call with these numbers.

        Args:
            max_tokens: M, that a rank gives in one call at most.
            hidden: H, channels.
            num_experts: E, of all ranks.
            device: of the tokens.

        Raises:
            UsageError: when the buffer is not of that mode, too small, or was given back; when memory is to
                be made and ranks are left out.
        """
        key = (max_tokens, hidden, num_experts)
        found = None if self._is_destroyed else self._engines.get(key)
        if found is None:
            self.check_low_latency(*key)
            self._refuse_masked()
            members = members_of(self.group, "moe/low_latency")
            found = self._engines[key] = LowLatency(
                members, *key, timeout=self._timeout, device=device, engine=self._engine
            )
            found.masks.on_timeout = "mask" if self.enable_shrink else "raise"
        assert isinstance(found, LowLatency)
        return found

    def check_low_latency(self, max_tokens: int, hidden: int, num_experts: int) -> None:
        """Check that there is room for a low-latency exchange. Not collective.

        Args:
            max_tokens: as for `low_latency`.
            hidden: as for `low_latency`.
            num_experts: as for `low_latency`.

        Raises:
            UsageError: when the buffer is not of that mode, too small, or was given back.
        """
        self._refuse_destroyed()
        if not self.low_latency_mode:
            raise UsageError("a Buffer made with low_latency_mode=False has no low-latency exchange")
        needed = size_hint(max_tokens, hidden, self.group_size, num_experts)
        if needed > self.num_rdma_bytes:
            raise UsageError(
                f"num_rdma_bytes={self.num_rdma_bytes} of the Buffer is less than the {needed} bytes of "
                f"{max_tokens} tokens of {hidden} channels for {num_experts} experts; see "
                "get_low_latency_rdma_size_hint()"
            )

    def masks(self) -> list[Masks]:
        """The masks of all low-latency exchanges there are.

        Raises:
            UsageError: when the buffer was made with `enable_shrink=False`.
        """
        self._refuse_destroyed()
        if not self.enable_shrink:
            raise UsageError("a Buffer made with enable_shrink=False leaves no rank out")
        return [engine.masks for engine in self._engines.values() if isinstance(engine, LowLatency)]

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Leave a rank out of low-latency exchanges, or take it in again. The same on all that go on.

        Args:
            rank_to_mask: in the group.
            mask: leave it out.

        Raises:
            UsageError: when the buffer was made with `enable_shrink=False`, or no exchange was made yet.
            ConfigError, CapabilityError: as `Masks.update` does.
        """
        found = self.masks()
        if not found:
            raise UsageError("ranks are masked once there is an exchange; call low_latency_dispatch() first")
        for masks in found:
            masks.update(rank_to_mask, mask)

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Write 1 for each rank that is left out, and 0 for the others. Not collective.

        Args:
            mask_status: int32 [R], written.

        Raises:
            UsageError: when the buffer was made with `enable_shrink=False`.
        """
        mask_status.zero_()
        for masks in self.masks():
            mask_status |= masks.query().to(mask_status.device)

    def low_latency_clean_mask_buffer(self) -> None:
        """Take all ranks in again. **Collective** among all of them.

        Raises:
            UsageError: when the buffer was made with `enable_shrink=False`.
            RendezvousError, CapabilityError: as `Masks.clean` does.
        """
        for masks in self.masks():
            masks.clean()

    def _refuse_masked(self) -> None:
        """Raise where ranks do not come that would have to make memory too."""
        status = torch.zeros(self.group_size, dtype=torch.int32, device="cpu")
        if self.enable_shrink:
            self.low_latency_query_mask_buffer(status)
        if masked := status.nonzero().flatten().tolist():
            raise UsageError(
                f"an exchange of other sizes needs memory of all ranks, and ranks {masked} are masked; make "
                "it before, by a call of each size, or call low_latency_clean_mask_buffer() on every rank"
            )

    def _refuse_destroyed(self) -> None:
        if self._is_destroyed:
            raise UsageError("the Buffer was destroyed")

    def destroy(self) -> None:
        """Give the memory back. Not collective; may be called twice.

        Raises:
            UsageError: when the buffer was made with `explicitly_destroy=False`: it goes with the object.
        """
        if not self.explicitly_destroy:
            raise UsageError("`explicitly_destroy` flag must be set")
        self._is_destroyed = True
        _close(self._engines)


def _close(engines: dict[_Key, HighThroughput | LowLatency]) -> None:
    with contextlib.ExitStack() as stack:
        for engine in engines.values():
            stack.callback(engine.close)
        engines.clear()
