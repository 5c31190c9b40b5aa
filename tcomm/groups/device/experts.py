"""How tokens go to experts and back, where nobody exchanges them: they stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tcomm.errors import ConfigError, UsageError

__all__ = ["ExpertTraffic"]


class ExpertTraffic:
    """Dispatch and combine of a group whose ranks each keep their own tokens. Nothing here is collective."""

    def dispatch(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        topk_ids: torch.Tensor | bool | None = None,
        is_sequence_parallel: bool | Sequence[torch.Tensor] | None = False,
        extra_tensors: Sequence[torch.Tensor] | None = None,
    ) -> tuple[Any, ...]:
        """Give the tokens back as they are.

        Both orders of arguments are understood: after the router's logits may come
        `is_sequence_parallel` and `extra_tensors`; after weights come `topk_ids` and then those two.

        Args:
            hidden_states: [T, H].
            router_logits: [T, E], or [T, k] weights where `topk_ids` is given.
            topk_ids: [T, k].
            is_sequence_parallel: whether the ranks of a TP group hold different tokens; makes no difference.
            extra_tensors: more tensors with a row for each token.

        Returns:
            `(hidden_states, router_logits)`, with `topk_ids` behind them where it was given, and a list of
            the extra tensors at the end where those were given, even if there are none.
        """
        if isinstance(topk_ids, bool) and not isinstance(is_sequence_parallel, bool):
            extra_tensors = is_sequence_parallel
        given = (hidden_states, router_logits)
        tokens = (*given, topk_ids) if isinstance(topk_ids, torch.Tensor) else given
        return tokens if extra_tensors is None else (*tokens, list(extra_tensors))

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

    def combine(self, hidden_states: torch.Tensor, is_sequence_parallel: bool = False) -> torch.Tensor:  # noqa: ARG002
        """The experts' results as they are.

        Args:
            hidden_states: [T, H].
            is_sequence_parallel: as for `dispatch`.
        """
        return hidden_states

    def allocate_combine_input(
        self,
        shape: Sequence[int],  # noqa: ARG002
        dtype: torch.dtype,  # noqa: ARG002
        device: torch.device,  # noqa: ARG002
        is_sequence_parallel: bool = False,  # noqa: ARG002
    ) -> torch.Tensor | None:
        """Memory from which results are combined without a copy: None, so the caller uses its own.

        Args:
            shape: [T, H].
            dtype: element type.
            device: of the results.
            is_sequence_parallel: as for `dispatch`.
        """
        return None

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
        combined = self.combine(hidden_states, is_sequence_parallel)
        if combined.shape != output.shape:
            raise UsageError(f"output {list(output.shape)} cannot take what is {list(combined.shape)}")
        return output.copy_(combined)

    def prepare_communication_buffer_for_model(self, model: nn.Module) -> None:
        """Make what the model's layers will need: nothing.

        Args:
            model: whose layers they are.

        Raises:
            ConfigError: when it is no module.
        """
        if not isinstance(model, nn.Module):
            raise ConfigError(f"a model is a torch.nn.Module, not {type(model).__name__}")
