"""A manager whose buffer outlives it, and whose ranks come and go."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist

from tcomm.config import EngineConfig
from tcomm.errors import UsageError
from tcomm.groups.all2all.base import All2AllManagerBase
from tcomm.groups.moe.elastic import ElasticBuffer
from tcomm.groups.stateless.group import StatelessProcessGroup
from tcomm.memory.exchange import Store

__all__ = ["NixlEPAll2AllManager"]


class NixlEPAll2AllManager(All2AllManagerBase):
    """`get_handle(kwargs)` gives an `ElasticBuffer`: one for the process, whatever becomes of managers.

    A group of another size is served by the same buffer, which then connects ranks, or disconnects the last.
    With `support_fault_tolerance` set to True before, it goes on without ranks that are lost.

    **Collective** to create.

    Args:
        cpu_group: the ranks that experts are spread over.
        tcp_store_group: with a `store` that ranks which come later have too; None: that of `cpu_group`.
    """

    _buffer: ClassVar[ElasticBuffer | None] = None
    _lock: ClassVar[threading.RLock] = threading.RLock()

    def __init__(
        self,
        cpu_group: dist.ProcessGroup | StatelessProcessGroup,
        tcp_store_group: StatelessProcessGroup | None = None,
    ) -> None:
        super().__init__(cpu_group, tcp_store_group)
        self.max_num_ep_ranks = EngineConfig.from_environment().nixl_ep_max_num_ranks

    def _store(self) -> Store:
        if self.tcp_store_group is not None:
            return cast("Store", self.tcp_store_group.store)
        if isinstance(self.cpu_group, StatelessProcessGroup):
            return cast("Store", self.cpu_group.store)
        return cast("Store", self.cpu_group.get_group_store())

    def get_handle(self, kwargs: Mapping[str, Hashable]) -> ElasticBuffer:
        """The buffer, with as many ranks connected as this group has.

        **Collective** where it is made, or its number of ranks is another.

        Args:
            kwargs: max_num_tokens_per_dp_rank, token_hidden_size, num_global_experts and num_ep_ranks.

        Raises:
            UsageError: when one is missing or makes no sense.
            GroupMismatchError, RendezvousError: when the ranks do not come together.
        """
        kind = NixlEPAll2AllManager
        with kind._lock:
            if kind._buffer is None:
                kind._buffer = self._make(kwargs)
                return kind._buffer
            kind._buffer.set_store(self._store())
            if kind._buffer.num_ranks < self.world_size:
                kind._buffer.connect_ranks(range(kind._buffer.num_ranks, self.world_size))
            elif kind._buffer.num_ranks > self.world_size:
                kind._buffer.disconnect_ranks(range(self.world_size, kind._buffer.num_ranks))
            return kind._buffer

    def _make(self, kwargs: Mapping[str, Any]) -> ElasticBuffer:
        names = ("max_num_tokens_per_dp_rank", "token_hidden_size", "num_global_experts", "num_ep_ranks")
        if missing := [name for name in names if name not in kwargs]:
            raise UsageError(
                f"a handle of NixlEPAll2AllManager is made of {', '.join(names)}; {missing} missing"
            )
        max_tokens, hidden, num_experts, num_ranks = (int(kwargs[name]) for name in names)
        if num_ranks != self.world_size or num_experts % num_ranks or num_ranks > self.max_num_ep_ranks:
            raise UsageError(
                f"{num_experts} experts on {num_ranks} ranks, in a group of {self.world_size} and at most "
                f"{self.max_num_ep_ranks} (TCOMM_NIXL_EP_MAX_NUM_RANKS)"
            )
        most, each = self.max_num_ep_ranks, num_experts // num_ranks
        on_timeout = "mask" if self.support_fault_tolerance else "raise"
        buffer = ElasticBuffer(self._store(), self.rank, on_timeout=on_timeout)
        nbytes = buffer.get_rdma_size_hint(max_tokens, hidden, most, most * each)
        buffer.update_memory_buffers(most, each, nbytes, max_tokens=max_tokens, hidden=hidden)
        buffer.connect_ranks(range(num_ranks))
        return buffer

    def _handle(self) -> ElasticBuffer:
        if NixlEPAll2AllManager._buffer is None:
            raise UsageError("there is no buffer; call get_handle() first")
        return NixlEPAll2AllManager._buffer

    def stage_ep_size(self) -> None:
        """Meet the ranks of this manager's group; the exchange goes on with those there were.

        **Collective** among the ranks of this group, where they become more.

        Raises:
            UsageError: when there is no buffer.
            GroupMismatchError, RendezvousError: when they do not come together.
        """
        with self._lock:
            buffer = self._handle()
            if self.world_size > buffer.num_ranks:
                buffer.set_store(self._store())
                buffer.stage(self.world_size)

    def commit_ep_size(self) -> None:
        """Exchange among the ranks of this manager's group from now on. **Collective** where they are fewer.

        Raises:
            UsageError: when there is no buffer.
            GroupMismatchError, RendezvousError: when they do not come together.
        """
        with self._lock:
            buffer = self._handle()
            buffer.commit()
            if self.world_size != buffer.num_ranks:
                self.get_handle({})

    def mask_remote_ranks(self) -> contextlib.AbstractContextManager[None]:
        """Leave all other ranks out inside: choices of their experts count as none. Not collective.

        Raises:
            UsageError: when there is no buffer.
        """
        return self._handle().mask_remote_ranks()

    def query_active_mask(self) -> torch.Tensor:
        """int32 [R]: 1 for each rank that is left out.

        Raises:
            UsageError: when there is no buffer.
        """
        mask = super().query_active_mask()
        self._handle().query_mask_buffer(mask)
        return mask

    def query_fault(self) -> torch.Tensor:
        """A boolean scalar: whether a call has lost a rank since `clean_buffers`.

        Raises:
            UsageError: when there is no buffer.
        """
        masks = self._handle().masks
        return super().query_fault() if masks is None else masks.query_fault().cpu()

    def clean_buffers(self) -> None:
        """Take all ranks in again. **Collective** among all of them.

        Raises:
            UsageError: when there is no buffer.
            CommError, CapabilityError: as `Masks.clean` does.
        """
        self._handle().clean_mask_buffer()

    def max_sms_used(self) -> int | None:
        """0: beside the exchange, computing may use the whole GPU."""
        return 0

    def destroy(self) -> None:
        """Nothing: the buffer is the process's, and the next manager finds it. See `destroy_buffer`."""

    @classmethod
    def destroy_buffer(cls) -> None:
        """Give the process's buffer back. Not collective; may be called twice."""
        with cls._lock:
            buffer, NixlEPAll2AllManager._buffer = NixlEPAll2AllManager._buffer, None
            if buffer is not None:
                buffer.destroy()
