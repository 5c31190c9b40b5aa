"""How tokens go to experts and back: by the group's manager; where it has none, they stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tcomm.errors import ConfigError
from tcomm.groups.all2all.base import All2AllManagerBase
from tcomm.groups.all2all.forms import copy_into, read_dispatch

__all__ = ["ExpertTraffic"]


class ExpertTraffic:
    """Dispatch and combine of a group: **collective** with a manager; else ranks keep their own tokens."""

    all2all_manager: All2AllManagerBase | None = None
    """What exchanges tokens, once somebody has put one here; ends with the communicator."""

    def dispatch(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        topk_ids: torch.Tensor | bool | None = None,
        is_sequence_parallel: bool | Sequence[torch.Tensor] | None = False,
        extra_tensors: Sequence[torch.Tensor] | None = None,
    ) -> tuple[Any, ...]:
        """Bring tokens to the ranks of their experts: `dispatch` of the manager, or as they are.

        Both orders of arguments are understood: after the router's logits may come
        `is_sequence_parallel` and `extra_tensors`; after weights come `topk_ids` and then those two.

        Args:
            hidden_states: [T, H].
            router_logits: [T, E], or [T, k] weights where `topk_ids` is given.
            topk_ids: [T, k].
            is_sequence_parallel: whether the ranks of a TP group hold different tokens.
            extra_tensors: more tensors with a row for each token.

        Returns:
            `(hidden_states, router_logits)`, with `topk_ids` behind them where it was given, and a list of
            the extra tensors at the end where those were given, even if there are none.

        Raises:
            UsageError: when there is nothing to dispatch beside the hidden states; as the manager does.
            NotOfferedError: a `NotImplementedError`; the manager is used by its `get_handle`.
        """
        arguments = (hidden_states, router_logits, topk_ids, is_sequence_parallel, extra_tensors)
        if self.all2all_manager is not None:
            return self.all2all_manager.dispatch(*arguments)
        given = read_dispatch(*arguments)
        return given.tensors if given.extras is None else (*given.tensors, given.extras)

    def dispatch_router_logits(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        is_sequence_parallel: bool = False,
        extra_tensors: Sequence[torch.Tensor] | None = None,
    ) -> tuple[Any, ...]:
        """`dispatch` by the router's logits: `(hidden_states, router_logits)` and the extra tensors.

        Args:
            hidden_states: [T, H].
            router_logits: [T, E].
            is_sequence_parallel: as for `dispatch`.
            extra_tensors: as for `dispatch`.
        """
        return self.dispatch(hidden_states, router_logits, None, is_sequence_parallel, extra_tensors)

    def combine(self, hidden_states: torch.Tensor, is_sequence_parallel: bool = False) -> torch.Tensor:
        """Bring the experts' results back: `combine` of the manager, or as they are.

        Args:
            hidden_states: [T, H], of all ranks' tokens where a manager dispatched them.
            is_sequence_parallel: as for `dispatch`.

        Raises:
            NotOfferedError, UsageError: as the manager does.
        """
        if self.all2all_manager is not None:
            return self.all2all_manager.combine(hidden_states, is_sequence_parallel)
        return hidden_states

    def allocate_combine_input(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        is_sequence_parallel: bool = False,
    ) -> torch.Tensor | None:
        """Memory from which results are combined without a copy, or None: the caller uses its own.

        Args:
            shape: [T, H].
            dtype: element type.
            device: of the results.
            is_sequence_parallel: as for `dispatch`.
        """
        if self.all2all_manager is None:
            return None
        return self.all2all_manager.allocate_combine_input(shape, dtype, device, is_sequence_parallel)

    def combine_into_output(
        self, hidden_states: torch.Tensor, output: torch.Tensor, is_sequence_parallel: bool = False
    ) -> torch.Tensor:
        """`combine` into memory of the caller.

        Args:
            hidden_states: [T, H].
            output: of the shape of the combined result.
            is_sequence_parallel: as for `dispatch`.

        Returns:
            `output`.

        Raises:
            UsageError: when `output` has another shape; copying would repeat rows.
        """
        if self.all2all_manager is not None:
            return self.all2all_manager.combine_into_output(hidden_states, output, is_sequence_parallel)
        return copy_into(output, self.combine(hidden_states, is_sequence_parallel))

    def prepare_communication_buffer_for_model(self, model: nn.Module) -> None:
        """Make what the model's layers will need: nothing.

        Args:
            model: whose layers they are.

        Raises:
            ConfigError: when it is no module.
        """
        if not isinstance(model, nn.Module):
            raise ConfigError(f"a model is a torch.nn.Module, not {type(model).__name__}")
