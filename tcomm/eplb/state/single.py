"""What a state for one model shows: its maps and counters, as attributes of the state."""

from __future__ import annotations

from typing import Any

import torch

from tcomm.eplb.state.model_state import EplbModelState
from tcomm.errors import UsageError

__all__ = ["SingleModel", "without_model"]


class SingleModel:
    """The maps and counters of the only model. UsageError where there is none, or several."""

    model_states: dict[str, EplbModelState]

    @property
    def physical_to_logical_map(self) -> torch.Tensor:
        """[L, P] int64: the expert in each slot."""
        return self._only.physical_to_logical_map

    @property
    def logical_to_physical_map(self) -> torch.Tensor:
        """[L, E, X] int64: the slots of each expert, filled up with -1."""
        return self._only.logical_to_physical_map

    @property
    def logical_replica_count(self) -> torch.Tensor:
        """[L, E] int64: how many they are."""
        return self._only.logical_replica_count

    @property
    def expert_load_pass(self) -> torch.Tensor:
        """[L, P / G] or [L, P] int32: tokens of each slot in this forward pass."""
        return self._only.expert_load_pass

    @property
    def expert_load_window(self) -> torch.Tensor:
        """[window, L, P / G] or [window, L, P] int32: the passes before."""
        return self._only.expert_load_window

    @property
    def _only(self) -> EplbModelState:
        if len(self.model_states) != 1:
            raise UsageError(
                f"the state has {len(self.model_states)} models; ask model_states for the maps of one"
            )
        return next(iter(self.model_states.values()))


def without_model(*arguments: Any) -> tuple[Any, ...]:
    """Arguments whose first is a model, from those given, which may begin with the second: a bool.

    Example:
        >>> without_model(True, False, None)
        (None, True, False)
    """
    return (None, *arguments[:-1]) if isinstance(arguments[0], bool) else arguments
