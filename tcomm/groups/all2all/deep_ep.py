"""Managers whose handle is a `Buffer`, with the methods of DeepEP."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from tcomm.config import EngineConfig
from tcomm.errors import UsageError
from tcomm.groups.all2all.base import All2AllManagerBase
from tcomm.groups.all2all.cache import Cache
from tcomm.groups.moe.buffer import Buffer
from tcomm.groups.moe.buffer_config import check_num_sms
from tcomm.groups.moe.low_latency_masks import Masks
from tcomm.groups.stateless.group import StatelessProcessGroup

__all__ = ["DeepEPAll2AllManagerBase", "DeepEPHTAll2AllManager", "DeepEPLLAll2AllManager"]

_NUM_SMS = 20


class DeepEPAll2AllManagerBase(All2AllManagerBase):
    """What both have in common: buffers that live as long as a layer keeps them. **Collective** to create.

    Args:
        cpu_group: the ranks that experts are spread over.
        tcp_store_group: as for the base.

    Attributes:
        handle_cache: the buffers.
        num_sms: the most processors that the high-throughput exchange is given.
    """

    def __init__(
        self,
        cpu_group: dist.ProcessGroup | StatelessProcessGroup,
        tcp_store_group: StatelessProcessGroup | None = None,
    ) -> None:
        super().__init__(cpu_group, tcp_store_group)
        self.handle_cache = Cache()
        self.num_sms = _NUM_SMS

    def destroy(self) -> None:
        """Destroy the buffers that are still kept, and forget them. Not collective; may be called twice."""
        for buffer in self.handle_cache.alive():
            buffer.destroy()
        self.handle_cache.clear()

    def _buffer(self, kwargs: dict[str, Any]) -> Buffer:
        # The group is the same for all of them, and one of the stateless kind cannot be hashed.
        make = functools.partial(Buffer, kwargs.pop("group"))
        buffer: Buffer = self.handle_cache.get_or_create(kwargs, make)
        return buffer

    def _nvl_nbytes(self) -> int:
        return EngineConfig.from_environment().deepep_buffer_size_mb << 20


class DeepEPHTAll2AllManager(DeepEPAll2AllManagerBase):
    """For many tokens: `get_handle({})` gives a `Buffer` for `dispatch` and `combine`."""

    def _make_all2all_kwargs(self) -> dict[str, Any]:
        config = EngineConfig.from_environment()
        num_nvl_bytes = self._nvl_nbytes()
        within_a_host = not self.internode or config.deepep_high_throughput_force_intra_node
        return {
            "group": self.cpu_group,
            "num_nvl_bytes": num_nvl_bytes,
            "num_rdma_bytes": 0 if within_a_host else num_nvl_bytes,
            "low_latency_mode": False,
            "num_qps_per_rank": 1 if within_a_host else self.num_sms // 2,
            "explicitly_destroy": True,
        }

    def get_handle(self, kwargs: Mapping[str, Hashable]) -> Buffer:
        """The buffer, the same one while somebody keeps it. **Collective** where there is none.

        Args:
            kwargs: nothing.

        Raises:
            UsageError: when there is something.
        """
        if kwargs:
            raise UsageError(
                f"DeepEPHTAll2AllManager expects no arguments. All the required args are computed in the "
                f"Manager itself. Got {sorted(kwargs)}"
            )
        return self._buffer(self._make_all2all_kwargs())

    def set_num_sms(self, num_sms: int) -> None:
        """Let all buffers use fewer processors; never more than `num_sms` of this manager.

        Raises:
            UsageError: when the number is odd or negative.
        """
        check_num_sms(num_sms)
        Buffer.set_num_sms(min(num_sms, self.num_sms))


class DeepEPLLAll2AllManager(DeepEPAll2AllManagerBase):
    """For few tokens: `get_handle(kwargs)` gives a `Buffer` for the low-latency calls.

    With `support_fault_tolerance` set to True before, buffers go on without ranks that are lost.
    """

    def _make_all2all_kwargs(
        self,
        max_num_tokens_per_dp_rank: int,
        token_hidden_size: int,
        num_ep_ranks: int,
        num_global_experts: int,
        num_local_experts: int,
    ) -> dict[str, Any]:
        """Arguments of the buffer.

        Args:
            max_num_tokens_per_dp_rank: the most that a rank dispatches at once; the same on every rank.
            token_hidden_size: channels of a token.
            num_ep_ranks: ranks of the EP group.
            num_global_experts: experts of the model.
            num_local_experts: experts of a rank.
        """
        shrinks = {"enable_shrink": True} if self.support_fault_tolerance else {}
        return shrinks | {
            "group": self.cpu_group,
            "num_nvl_bytes": self._nvl_nbytes(),
            "num_rdma_bytes": Buffer.get_low_latency_rdma_size_hint(
                max_num_tokens_per_dp_rank, token_hidden_size, num_ep_ranks, num_global_experts
            ),
            "low_latency_mode": True,
            "num_qps_per_rank": num_local_experts,
            "allow_nvlink_for_low_latency_mode": True,
            "allow_mnnvl": EngineConfig.from_environment().deepep_low_latency_use_mnnvl,
            "explicitly_destroy": True,
        }

    def get_handle(self, kwargs: Mapping[str, Any]) -> Buffer:
        """The buffer, the same one for the same arguments while somebody keeps it.

        **Collective** where there is none.

        Args:
            kwargs: max_num_tokens_per_dp_rank, token_hidden_size, num_ep_ranks, num_global_experts and
                num_local_experts.

        Raises:
            TypeError: when one is missing, or another is given.
        """
        return self._buffer(self._make_all2all_kwargs(**kwargs))

    def max_sms_used(self) -> int | None:
        """0: beside the exchange, computing may use the whole GPU."""
        return 0

    def query_active_mask(self) -> torch.Tensor:
        """int32 [R]: 1 for each rank that a buffer goes on without."""
        mask = super().query_active_mask()
        for masks in self._masks():
            mask |= masks.query().cpu()
        return mask

    def query_fault(self) -> torch.Tensor:
        """A boolean scalar: whether a call has lost a rank since `clean_buffers`."""
        return torch.tensor(any(masks.faults for masks in self._masks()), device="cpu")

    def clean_buffers(self) -> None:
        """Take all ranks in again. **Collective** among all of them.

        Raises:
            RendezvousError, CapabilityError: as `Masks.clean` does.
        """
        for masks in self._masks():
            masks.clean()

    def _masks(self) -> list[Masks]:
        buffers = self.handle_cache.alive() if self.support_fault_tolerance else []
        return [masks for buffer in buffers for masks in buffer.masks()]
