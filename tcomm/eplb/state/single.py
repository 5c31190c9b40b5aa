"""What a state for one model shows: its maps and counters, as attributes of the state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from tcomm.eplb.state.model_state import EplbModelState
from tcomm.errors import UsageError

__all__ = ["SingleModel", "model_may_be_left_out"]

P = ParamSpec("P")
R = TypeVar("R")


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


def model_may_be_left_out(method: Callable[P, R]) -> Callable[P, R]:
    """A method whose first argument is a model; where the second, a bool, comes first, there is no model.

    Example: with `step(model=None, is_dummy=False)`, `step(True)` is a dummy step.
    """

    @functools.wraps(method)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if len(args) > 1 and isinstance(args[1], bool):
            shifted: Any = (args[0], None, *args[1:])
            return method(*shifted, **kwargs)
        return method(*args, **kwargs)

    return called
