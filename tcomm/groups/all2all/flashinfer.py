"""Managers with FlashInfer's interfaces: tokens go through rings of both sides, or by one side alone."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Self

import torch
import torch.distributed as dist

from tcomm.errors import ConfigError, UsageError
from tcomm.groups.all2all.base import All2AllManagerBase
from tcomm.groups.arguments import UNSET, Timeout, Unset
from tcomm.groups.moe.members import members_of
from tcomm.groups.moe.one_sided import OneSided
from tcomm.groups.moe.two_sided import RoutingInfo, TwoSided
from tcomm.groups.stateless.group import StatelessProcessGroup

__all__ = ["FlashInferAllToAllManager", "FlashInferNVLinkOneSidedManager", "FlashInferNVLinkTwoSidedManager"]


class FlashInferNVLinkTwoSidedManager(All2AllManagerBase):
    """For any number of tokens in little memory: `prepare`, `alltoallv` and `combine` through rings.

    **Collective** to create.

    Args:
        cpu_group: the ranks that experts are spread over.
        tcp_store_group: as for the base.

    Attributes:
        initialized: whether there are rings.
    """

    def __init__(
        self,
        cpu_group: dist.ProcessGroup | StatelessProcessGroup,
        tcp_store_group: StatelessProcessGroup | None = None,
    ) -> None:
        super().__init__(cpu_group, tcp_store_group)
        self._exchange: TwoSided | None = None

    @property
    def initialized(self) -> bool:
        """Whether there are rings."""
        return self._exchange is not None

    def initialize(self, world_size: int, rank: int, gpus_per_node: int) -> None:
        """Make the rings, unless there are some. **Collective.**

        Args:
            world_size: of the group.
            rank: of this process in it.
            gpus_per_node: GPUs of a host.

        Raises:
            ConfigError: when an argument is no number, or not the group's.
            CapabilityError: when the ranks share no memory.
        """
        if self.initialized:
            return
        for name, given in (("world_size", world_size), ("rank", rank), ("gpus_per_node", gpus_per_node)):
            if type(given) is not int:
                raise ConfigError(f"{name}={given!r} is no number")
        if (world_size, rank) != (self.world_size, self.rank):
            raise ConfigError(
                f"rank {rank} of {world_size} is not this one, which is {self.rank} of {self.world_size}"
            )
        self._exchange = TwoSided(members_of(self.cpu_group, "two_sided"), device=_device_of_tokens())

    def ensure_alltoall_workspace_initialized(self) -> bool:
        """Make the rings where there are none. **Collective**, then.

        Returns:
            Whether there are any: not for a group of one rank.
        """
        if self.world_size <= 1:
            return False
        if not self.initialized:
            gpus_per_node = torch.cuda.device_count() or self.world_size
            self.initialize(self.world_size, self.rank, gpus_per_node)
        return self.initialized

    def get_handle(self, kwargs: Mapping[str, Hashable]) -> Self:
        """This manager, which has the calls itself."""
        del kwargs
        return self

    def prepare(
        self,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        max_num_tokens: int,
        num_experts: int,
        *,
        timeout: Timeout | Unset = UNSET,
    ) -> tuple[RoutingInfo, torch.Tensor, torch.Tensor]:
        """See `TwoSided.prepare`. **Collective.**

        Raises:
            UsageError: when there are no rings.
        """
        return self._rings("prepare").prepare(
            topk_ids, topk_weights, max_num_tokens, num_experts, timeout=timeout
        )

    def alltoallv(
        self, x: torch.Tensor, info: RoutingInfo, *, timeout: Timeout | Unset = UNSET
    ) -> torch.Tensor:
        """See `TwoSided.alltoallv`. **Collective.**

        Raises:
            UsageError: when there are no rings.
        """
        return self._rings("alltoallv").alltoallv(x, info, timeout=timeout)

    def combine(
        self,
        hidden_states: torch.Tensor,
        info: bool | RoutingInfo = False,
        top_k: int = 0,
        *,
        sizes: Sequence[int] | None = None,
        timeout: Timeout | Unset = UNSET,
    ) -> torch.Tensor:
        """See `TwoSided.combine`. **Collective.**

        Raises:
            NotOfferedError: a `NotImplementedError`; without the routing of `prepare`.
            UsageError: when there are no rings.
        """
        if not isinstance(info, RoutingInfo) or sizes is not None:
            raise self._not_offered("combine by sizes", "prepare, alltoallv and combine with the routing")
        return self._rings("combine").combine(hidden_states, info, top_k, timeout=timeout)

    def _rings(self, verb: str) -> TwoSided:
        if self._exchange is None:
            raise UsageError(f"{verb} has no rings; call ensure_alltoall_workspace_initialized() first")
        return self._exchange

    def cleanup(self) -> None:
        """Give the rings back, if there are any. Not collective."""
        if self._exchange is not None:
            self._exchange.close()
        self._exchange = None

    def destroy(self) -> None:
        """`cleanup`."""
        self.cleanup()


FlashInferAllToAllManager = FlashInferNVLinkTwoSidedManager
"""The name of older versions."""


class FlashInferNVLinkOneSidedManager(All2AllManagerBase):
    """For tokens that are quantised before they travel: `get_handle` gives a `OneSided`.

    **Collective** to create. All layers share one workspace, which grows to what the largest of them needs.

    Args:
        cpu_group: the ranks that experts are spread over.
        tcp_store_group: as for the base.

    Attributes:
        initialized: whether there is a workspace.
    """

    def __init__(
        self,
        cpu_group: dist.ProcessGroup | StatelessProcessGroup,
        tcp_store_group: StatelessProcessGroup | None = None,
    ) -> None:
        super().__init__(cpu_group, tcp_store_group)
        self._exchange: OneSided | None = None

    @property
    def initialized(self) -> bool:
        """Whether there is a workspace."""
        return self._exchange is not None

    def initialize(
        self,
        max_num_tokens: int,
        top_k: int,
        num_experts: int,
        hidden_size: int,
        extra_nbytes_per_token: int = 0,
    ) -> None:
        """Have a workspace for so many tokens. **Collective** where what there is does not suffice.

        A token has room for NVFP4 values, fp8 scales, ids and weights when it is dispatched,
        `H/2 + H/16 + 8k` bytes and the extra ones, and for 16-bit values when it is combined.

        Args:
            max_num_tokens: of a rank, at most.
            top_k: experts of a token; of all layers.
            num_experts: of all ranks; of all layers.
            hidden_size: values of a token, at most.
            extra_nbytes_per_token: bytes of a dispatched token beyond those, at most.

        Raises:
            UsageError: when another layer has another top_k or num_experts, or a dispatch was not combined.
            ConfigError: when an argument makes no sense.
            CapabilityError: when the ranks share no memory, or too little of it is free.
        """
        if type(hidden_size) is not int or hidden_size <= 0:
            raise ConfigError(f"hidden_size={hidden_size!r} is not a positive number")
        if type(extra_nbytes_per_token) is not int or extra_nbytes_per_token < 0:
            raise ConfigError(f"extra_nbytes_per_token={extra_nbytes_per_token!r} is negative, or no number")
        dispatched = -(-hidden_size // 2) + -(-hidden_size // 16) + 8 * top_k + extra_nbytes_per_token
        needed = (max_num_tokens, dispatched, 2 * hidden_size)
        before = self._exchange
        if before is not None:
            if (top_k, num_experts) != (before.top_k, before.num_experts):
                raise UsageError(
                    f"the layers of a group share a workspace, and one has top_k={before.top_k} of "
                    f"{before.num_experts} experts, another top_k={top_k} of {num_experts}"
                )
            room = before.layout
            had = (room.max_num_tokens, room.dispatch_nbytes_per_token, room.combine_nbytes_per_token)
            needed = (max(had[0], needed[0]), max(had[1], needed[1]), max(had[2], needed[2]))
            if needed == had:
                return
            if before.is_dispatched:
                raise UsageError("the workspace cannot grow while a dispatch waits for its combine")
        members = members_of(self.cpu_group, "one_sided")
        self._exchange = OneSided(
            members, needed[0], top_k, num_experts, *needed[1:], device=_device_of_tokens()
        )
        if before is not None:
            before.close()

    def get_handle(self, kwargs: Mapping[str, Hashable]) -> OneSided:
        """What layers call, until a later `initialize` needs more room.

        Raises:
            UsageError: before `initialize`.
        """
        del kwargs
        return self.get_communication()

    def get_communication(self) -> OneSided:
        """The workspace and its calls.

        Raises:
            UsageError: before `initialize`.
        """
        if self._exchange is None:
            raise UsageError("there is no workspace; call initialize() first")
        return self._exchange

    def cleanup(self) -> None:
        """Give the workspace back, if there is one. Not collective."""
        if self._exchange is not None:
            self._exchange.close()
        self._exchange = None

    def destroy(self) -> None:
        """`cleanup`."""
        self.cleanup()


def _device_of_tokens() -> torch.device:
    """Where layers keep their tokens: on the current GPU, where there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
