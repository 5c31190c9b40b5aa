"""What a model must have so that its experts can be balanced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableSequence
from typing import Protocol, runtime_checkable

import torch

from tcomm.eplb.moving.rows import check_layers
from tcomm.errors import ConfigError

__all__ = ["MixtureOfExperts", "check_model", "check_weights"]


@runtime_checkable
class MixtureOfExperts(Protocol):
    """A model with experts. `isinstance` asks whether all of these names are there.

    A model may have `update_physical_experts_metadata(num_physical_experts, num_local_physical_experts)` too:
    it is called when the number of slots has changed.
    """

    expert_weights: MutableSequence[Iterable[torch.Tensor]]
    """Of each layer with experts: its parameters on this rank, each `[P / G, ...]`."""
    num_moe_layers: int
    """Layers with experts, L."""
    num_expert_groups: int
    """Groups of neighbouring experts."""
    num_logical_experts: int
    """Experts of a layer, E."""
    num_physical_experts: int
    """Slots of a layer, P."""
    num_local_physical_experts: int
    """Slots of a layer on this rank, P / G."""
    num_routed_experts: int
    """Experts that a router chooses from."""
    num_shared_experts: int
    """Experts that take every token; they have no slots."""
    num_redundant_experts: int
    """Slots beyond the first of each expert, P - E."""

    def set_eplb_state(
        self,
        expert_load_view: torch.Tensor,
        logical_to_physical_map: torch.Tensor,
        logical_replica_count: torch.Tensor,
    ) -> None:
        """Give layer i the i-th slice of each, and collect `expert_weights`.

        These are views that stay where they are and are written in place. A token that chooses expert e
        goes to slot `logical_to_physical_map[i, e, h % logical_replica_count[i, e]]` for some h, and what
        counts the tokens of that slot grows by one.

        Args:
            expert_load_view: int32, tokens of each slot in this forward pass: [L, P / G] for the slots of
                this rank, or [L, P] and more columns for all slots.
            logical_to_physical_map: [L, E, X] int64, filled up with -1.
            logical_replica_count: [L, E] int64.
        """


def check_model(model: object, num_ranks: int) -> MixtureOfExperts:
    """The model, when it is one whose experts `num_ranks` ranks can share.

    Raises:
        ConfigError: when it lacks something; names it. When its numbers do not fit together.
    """
    names = [*MixtureOfExperts.__annotations__, "set_eplb_state"]
    if missing := [name for name in names if not hasattr(model, name)]:
        raise ConfigError(f"{type(model).__name__} is no mixture of experts: it has no {', '.join(missing)}")
    assert isinstance(model, MixtureOfExperts)
    slots, local = model.num_physical_experts, model.num_local_physical_experts
    if slots != local * num_ranks:
        raise ConfigError(
            f"the model has {slots} slots, {local} of them on this rank; {num_ranks} ranks that share them "
            f"evenly have {local * num_ranks}"
        )
    if slots != model.num_logical_experts + model.num_redundant_experts:
        raise ConfigError(
            f"the model has {slots} slots, {model.num_logical_experts} experts and "
            f"{model.num_redundant_experts} redundant ones; there must be as many slots as both together"
        )
    return model


def check_weights(model: MixtureOfExperts, num_layers: int, num_local: int) -> None:
    """Check that a model has the weights of every layer, a row for each slot, so that they can be moved.

    Raises:
        ConfigError: when it has not; says where.
    """
    if len(model.expert_weights) != num_layers:
        raise ConfigError(
            f"expert_weights has {len(model.expert_weights)} layers where the model has {num_layers}; "
            "set_eplb_state has to collect them"
        )
    for layer, weights in enumerate(model.expert_weights):
        if isinstance(weights, Iterator):
            raise ConfigError(f"expert_weights of layer {layer} can be read only once; give a list")
        rows = [tuple(weight.shape[:1]) for weight in weights]
        if not rows or any(row != (num_local,) for row in rows):
            raise ConfigError(
                f"expert_weights of layer {layer} have {[row[0] if row else 0 for row in rows]} rows; "
                f"each needs {num_local}, one for each slot of this rank"
            )
    check_layers([list(weights) for weights in model.expert_weights])
