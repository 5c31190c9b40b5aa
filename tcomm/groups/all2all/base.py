"""What all managers of a token exchange have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from tcomm.errors import NotOfferedError
from tcomm.groups.all2all.forms import copy_into
from tcomm.groups.all2all.surroundings import Coordinator, current_coordinator, find_coordinator
from tcomm.groups.helpers.loggers import init_logger
from tcomm.groups.stateless.group import StatelessProcessGroup
from tcomm.groups.stateless.same_node import in_the_same_node_as, place_of

__all__ = ["All2AllManagerBase"]


class All2AllManagerBase:
    """How the layers of one expert group exchange tokens. **Collective** to create.

    The DP and TP groups are the current ones when the manager is made, or when they are first asked for.

    Args:
        cpu_group: the ranks that experts are spread over.
        tcp_store_group: with a `store` where ranks can meet that are not in `cpu_group`.

    Attributes:
        rank, world_size: in `cpu_group`.
        internode: whether they are on several hosts.
        support_fault_tolerance: whether the manager goes on without ranks that it lost.

    Raises:
        PeerTimeoutError, PeerLostError: when a rank did not come.
    """

    support_fault_tolerance = False

    def __init__(
        self,
        cpu_group: dist.ProcessGroup | StatelessProcessGroup,
        tcp_store_group: StatelessProcessGroup | None = None,
    ) -> None:
        self.cpu_group = cpu_group
        self.tcp_store_group = tcp_store_group
        self.rank, self.world_size = place_of(cpu_group)
        self._around = {kind: find_coordinator(kind) for kind in ("dp", "tp", "pcp", "ep")}
        self.internode = not all(in_the_same_node_as(cpu_group, source_rank=0))

    def _group(self, kind: str) -> Coordinator:
        """The group of a kind that was current when this manager was made, else the one that is now."""
        found = self._around[kind]
        if found is None:
            found = self._around[kind] = current_coordinator(kind)
        return found

    @property
    def dp_group(self) -> Coordinator:
        """The data parallel group.

        Raises:
            UsageError: when there is none.
        """
        return self._group("dp")

    @property
    def tp_group(self) -> Coordinator:
        """The tensor parallel group.

        Raises:
            UsageError: when there is none.
        """
        return self._group("tp")

    @property
    def dp_rank(self) -> int:
        """This rank in the data parallel group."""
        return self.dp_group.rank_in_group

    @property
    def dp_world_size(self) -> int:
        """Ranks of the data parallel group."""
        return self.dp_group.world_size

    def get_handle(self, kwargs: Mapping[str, Hashable]) -> Any:
        """What layers call instead of `dispatch` and `combine`. **Collective** where one is made.

        Args:
            kwargs: what it is made for; see the manager.

        Raises:
            NotOfferedError: a `NotImplementedError`; this manager has none.
        """
        del kwargs
        raise self._not_offered("get_handle", "dispatch and combine")

    def dispatch(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor | None = None,
        topk_ids: torch.Tensor | bool | None = None,
        is_sequence_parallel: bool | Sequence[torch.Tensor] | None = False,
        extra_tensors: Sequence[torch.Tensor] | None = None,
        *,
        router_logits: torch.Tensor | None = None,
        sizes: Sequence[int] | None = None,
    ) -> tuple[Any, ...]:
        """Bring all tokens to all ranks that may need them. **Collective.**

        Both orders of arguments are understood: after the router's logits may come
        `is_sequence_parallel` and `extra_tensors`; after weights come `topk_ids` and then those two.

        Args:
            hidden_states: [T, H].
            topk_weights: [T, k], or the router's logits [T, E].
            topk_ids: [T, k]; none with logits.
            is_sequence_parallel: whether the ranks of a TP group hold different tokens.
            extra_tensors: more tensors [T, ...].
            router_logits: the logits by name.
            sizes: tokens of each rank of the group that exchanges; None: as the current metadata says.

        Returns:
            The tensors in their order with the rows of all ranks, and a list of the extra tensors at the
            end where those were given, even if there are none.

        Raises:
            NotOfferedError: a `NotImplementedError`; this manager is used by `get_handle`.
        """
        del hidden_states, topk_weights, topk_ids, is_sequence_parallel, extra_tensors, router_logits, sizes
        raise self._not_offered("dispatch", "get_handle")

    def dispatch_router_logits(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        is_sequence_parallel: bool = False,
        extra_tensors: Sequence[torch.Tensor] | None = None,
        *,
        sizes: Sequence[int] | None = None,
    ) -> tuple[Any, ...]:
        """`dispatch` by the router's logits [T, E]. **Collective.**

        Args:
            hidden_states: [T, H].
            router_logits: [T, E].
            is_sequence_parallel: as for `dispatch`.
            extra_tensors: as for `dispatch`.
            sizes: as for `dispatch`.

        Raises:
            NotOfferedError: a `NotImplementedError`; this manager is used by `get_handle`.
        """
        return self.dispatch(
            hidden_states, router_logits, None, is_sequence_parallel, extra_tensors, sizes=sizes
        )

    def combine(
        self,
        hidden_states: torch.Tensor,
        is_sequence_parallel: bool = False,
        *,
        sizes: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Bring back what the experts made of this rank's tokens. **Collective.**

        Args:
            hidden_states: [sum of sizes, H]: for every token what this rank's experts add, else 0.
            is_sequence_parallel: as for `dispatch`.
            sizes: as for `dispatch`.

        Returns:
            [T, H]: the sum over the ranks.

        Raises:
            NotOfferedError: a `NotImplementedError`; this manager is used by `get_handle`.
        """
        del hidden_states, is_sequence_parallel, sizes
        raise self._not_offered("combine", "get_handle")

    def allocate_combine_input(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        is_sequence_parallel: bool = False,
    ) -> torch.Tensor | None:
        """Memory from which results are combined without a copy: None, so the caller uses its own."""

    def combine_into_output(
        self, hidden_states: torch.Tensor, output: torch.Tensor, is_sequence_parallel: bool = False
    ) -> torch.Tensor:
        """`combine` into memory of the caller. **Collective.**

        Args:
            hidden_states: as for `combine`.
            output: [T, H].
            is_sequence_parallel: as for `dispatch`.

        Returns:
            `output`.

        Raises:
            UsageError: when `output` has another shape than the result.
        """
        return copy_into(output, self.combine(hidden_states, is_sequence_parallel))

    def set_num_sms(self, num_sms: int) -> None:
        """How much of a GPU the exchange may use: nothing here is bound to processors."""

    def max_sms_used(self) -> int | None:
        """The most processors of a GPU that an exchange keeps busy; None: it may use all of them."""

    def query_active_mask(self) -> torch.Tensor:
        """int32 [R]: 1 for each rank that is left out. Nobody is, where faults are not supported."""
        return torch.zeros(self.world_size, dtype=torch.int32, device="cpu")

    def query_fault(self) -> torch.Tensor:
        """A boolean scalar: whether ranks were lost since somebody last looked."""
        return torch.zeros((), dtype=torch.bool, device="cpu")

    def clean_buffers(self) -> None:
        """Take all ranks in again and forget what their buffers hold. Nobody was left out here."""

    def stage_ep_size(self) -> None:
        """Get ready for another number of ranks: nothing here depends on it."""

    def commit_ep_size(self) -> None:
        """Change to the number of ranks that was staged: nothing here depends on it."""

    def mask_remote_ranks(self) -> contextlib.AbstractContextManager[None]:
        """Leave all other ranks out inside.

        Raises:
            NotOfferedError: a `NotImplementedError`; this manager leaves nobody out.
        """
        raise self._not_offered("mask_remote_ranks", "a manager with support_fault_tolerance")

    def checkpoint_prepare(self) -> None:
        """Let go of what a checkpoint of the process cannot keep: told once that nothing is done."""
        _tell_no_checkpoint(type(self).__name__)

    def checkpoint_restore(self) -> None:
        """Take up again what `checkpoint_prepare` let go of: told once that nothing is done."""
        _tell_no_checkpoint(type(self).__name__)

    def destroy(self) -> None:
        """Give back what was made here. May be called twice. Nothing was."""

    def _not_offered(self, method: str, instead: str) -> NotOfferedError:
        return NotOfferedError(f"{type(self).__name__} has no {method}; use {instead}")


def _tell_no_checkpoint(name: str) -> None:
    init_logger("tcomm").warning_once("%s keeps its memory over a checkpoint of the process", name)
