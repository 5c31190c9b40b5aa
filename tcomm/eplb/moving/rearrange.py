"""Rearranging the experts of a model: from maps to moves, layer after layer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from tcomm.eplb.migration import LayerMoves, migration
from tcomm.eplb.moving.communicator import EplbCommunicator
from tcomm.eplb.moving.groups import ExpertGroup, size_of
from tcomm.eplb.moving.interrupts import interrupts_later
from tcomm.eplb.moving.making import make_mover
from tcomm.eplb.moving.mover import WeightMover
from tcomm.eplb.moving.rank_mapping import widen_maps
from tcomm.eplb.moving.rows import check_layers
from tcomm.eplb.shapes import IntArray
from tcomm.errors import CommError, ConfigError, UsageError
from tcomm.groups.arguments import UNSET, Timeout, Unset

__all__ = ["map_of", "rearrange_expert_weights_inplace"]

logger = logging.getLogger("tcomm")


def rearrange_expert_weights_inplace(  # noqa: PLR0913 - as its users know it, and what is ours
    old_global_expert_indices: torch.Tensor | npt.ArrayLike,
    new_global_expert_indices: torch.Tensor | npt.ArrayLike,
    expert_weights: Sequence[Iterable[torch.Tensor]],
    ep_group: ExpertGroup,
    is_profile: bool = False,
    rank_mapping: Mapping[int, int] | None = None,
    *,
    mover: WeightMover | None = None,
    communicator: EplbCommunicator | None = None,
    timeout: Timeout | Unset = UNSET,
    on_layer: Callable[[int], None] | None = None,
) -> None:
    """Move the weights of experts so that every slot has what the new map says. **Collective.**

    Each layer changes on all ranks or on none. Where nothing has to be moved nobody is waited for.

    Args:
        old_global_expert_indices: [L, P] integers, the expert in each slot; -1: none. The same on all ranks.
        new_global_expert_indices: [L, P], likewise; a slot with -1 keeps what it has.
        expert_weights: for each layer its tensors of [P / G, ...], contiguous, those of all layers alike.
        ep_group: `GroupCoordinator`, process group or `StatelessProcessGroup` of G ranks.
        is_profile: reserve the memory that a layer takes, and move nothing.
        rank_mapping: from old rank to new rank where ranks join or leave: see `rank_change`.
        mover: what moves the weights, to be kept by the caller; None: one is made, and closed at the end.
        communicator: for `make_mover`, where no mover is given.
        timeout: for `make_mover`, likewise.
        on_layer: told the number of each layer once its weights are new, in order.

    Raises:
        UsageError: when the maps are of different sizes, not of as many layers as the weights, or have
            another number of slots than the ranks have together.
        ConfigError: when another argument is wrong. Nobody is waited for.
        CollectiveMismatchError: when the ranks are to move different things; they wait no longer than that.
        PeerLostError, PeerTimeoutError: when a peer is dead or late; names it, and says which layers are new:
            the same on every rank that lives.
        CapabilityError, GroupMismatchError, RendezvousError: from `make_mover`.
    """
    world_size = size_of(ep_group)
    layers = [list(weights) for weights in expert_weights]
    moves = _plan(old_global_expert_indices, new_global_expert_indices, layers, world_size, rank_mapping)
    if not layers or not (is_profile or any(needed.has_copies for needed in moves)):
        _tell_all(on_layer, moves, is_profile)
        return
    used = mover or make_mover(ep_group, layers[0], timeout=timeout, communicator=communicator)
    try:
        if is_profile:
            used.reserve(layers[0])
        else:
            _move(used, moves, layers, on_layer)
    finally:
        if mover is None:
            used.close()


def _tell_all(on_layer: Callable[[int], None] | None, moves: Sequence[LayerMoves], is_profile: bool) -> None:
    if on_layer is not None and not is_profile:
        for layer in range(len(moves)):
            on_layer(layer)


def map_of(which: str, given: torch.Tensor | npt.ArrayLike) -> IntArray:
    """A map [L, P] on the host.

    Raises:
        ConfigError: when it has other axes, no integers, or numbers below -1.
    """
    try:
        host = given.detach().to("cpu").numpy() if isinstance(given, torch.Tensor) else np.asarray(given)
    except ValueError as error:
        raise ConfigError(f"the {which} expert indices are no map: {error}") from None
    if host.ndim != 2 or not np.issubdtype(host.dtype, np.integer):
        raise ConfigError(
            f"the {which} expert indices are {host.dtype}{list(host.shape)}; needed integers [layers, slots]"
        )
    indices = host.astype(np.int64)
    if indices.size and indices.min() < -1:
        raise ConfigError(f"the {which} expert indices contain {indices.min()}; give experts, or -1 for none")
    return indices


def _plan(
    old: torch.Tensor | npt.ArrayLike,
    new: torch.Tensor | npt.ArrayLike,
    layers: Sequence[list[torch.Tensor]],
    world_size: int,
    rank_mapping: Mapping[int, int] | None,
) -> tuple[LayerMoves, ...]:
    """What each layer needs, once everything has been checked."""
    before, after = widen_maps(map_of("old", old), map_of("new", new), rank_mapping, world_size)
    if before.shape != after.shape:
        raise UsageError(
            f"the old expert indices are {list(before.shape)} and the new ones {list(after.shape)}; give the "
            "same layers and slots, and a rank_mapping where ranks join or leave"
        )
    if len(layers) != len(before):
        raise UsageError(f"weights of {len(layers)} layers and maps of {len(before)}; give one for each")
    rows = check_layers(layers)
    if rows is None:
        return ()
    if before.shape[1] != world_size * rows.num_slots:
        raise UsageError(
            f"maps of {before.shape[1]} slots for {world_size} ranks with {rows.num_slots} slots each; "
            f"needed {world_size * rows.num_slots}"
        )
    moves = migration(before, after, world_size).layers
    _tell_missing(moves, after)
    return moves


def _tell_missing(moves: Sequence[LayerMoves], new: IntArray) -> None:
    """Say in one line which experts nobody has."""
    told = [
        f"layer {layer}: {sorted(set(new[layer, list(each.missing)].tolist()))}"
        for layer, each in enumerate(moves)
        if each.missing
    ]
    if told:
        logger.warning("no rank has these experts, whose slots keep what they have: %s", "; ".join(told))


def _move(
    mover: WeightMover,
    moves: Sequence[LayerMoves],
    layers: Sequence[list[torch.Tensor]],
    on_layer: Callable[[int], None] | None,
) -> None:
    for layer, (needed, weights) in enumerate(zip(moves, layers, strict=True)):
        if needed.has_copies:
            try:
                mover.prepare(layer, needed, weights)
            except CommError as error:
                error.args = (f"{error}; {_how_far(layer, len(moves))}",)
                raise
        with interrupts_later():
            if needed.has_copies:
                mover.commit(layer, needed, weights)
            if on_layer is not None:
                on_layer(layer)


def _how_far(layer: int, num_layers: int) -> str:
    if not layer:
        return f"all {num_layers} layers keep their old experts"
    return (
        f"layers 0 to {layer - 1} have their new experts, and {layer} to {num_layers - 1} keep the old ones"
    )
