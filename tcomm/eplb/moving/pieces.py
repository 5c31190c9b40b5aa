"""Moving one layer in the pieces that vllm.distributed has, for those who call them themselves.

They have no verdict: a peer that dies in the middle ends the call with an error on those who wait for it,
and not on others. `WeightMover` is what moves layers on all ranks or on none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from tcomm.eplb.migration import LayerMoves
from tcomm.eplb.moving.batches import layer_moves
from tcomm.eplb.moving.creation import create_eplb_communicator
from tcomm.eplb.moving.groups import ExpertGroup, rank_of, size_of
from tcomm.eplb.moving.messages import bring_rows
from tcomm.eplb.moving.rank_mapping import widen_maps
from tcomm.eplb.moving.rearrange import map_of
from tcomm.eplb.moving.rows import LayerRows
from tcomm.errors import ConfigError

if TYPE_CHECKING:
    from tcomm.eplb.moving.communicator import EplbCommunicator

__all__ = [
    "RecvMetadata",
    "TransferMetadata",
    "get_ep_ranks_with_experts_batch",
    "move_from_buffer",
    "move_to_buffer",
    "transfer_layer",
    "transfer_metadata",
]

BoolArray = npt.NDArray[np.bool_]


@dataclasses.dataclass
class RecvMetadata:
    """What a rank gets from others in one layer."""

    recv_primary_mask: BoolArray
    """[slots of a rank], those into which an expert comes; further slots of it are copied from there."""
    recv_count: int
    """How many they are."""
    recv_expert_ids: npt.NDArray[np.int64]
    """[slots of a rank], the experts that come, `recv_count` of them in ascending order; -1 behind them."""
    recv_dst_rows: npt.NDArray[np.int32]
    """[slots of a rank], the slot of each; -1 behind them."""


@dataclasses.dataclass
class TransferMetadata(RecvMetadata):
    """What becomes of each slot of a rank in one layer."""

    is_unchanged: BoolArray
    """[slots of a rank], those whose expert stays."""
    is_received_locally: BoolArray
    """[slots of a rank], those, and the ones whose new expert this rank has already."""


def transfer_metadata(
    num_local_experts: int, old_indices: npt.ArrayLike, new_indices: npt.ArrayLike, ep_rank: int
) -> TransferMetadata:
    """What becomes of each slot of a rank.

    Args:
        num_local_experts: slots of a rank.
        old_indices: [P], the map in force; -1 holds no expert.
        new_indices: [P], the map to come; a slot with -1 is left alone.
        ep_rank: the rank.

    Raises:
        ConfigError: as `layer_moves` does, or when there is no such rank.
    """
    return _metadata(
        layer_moves(num_local_experts, old_indices, new_indices), num_local_experts, old_indices, new_indices,
        ep_rank,
    )  # fmt: skip


def _metadata(
    moves: LayerMoves, size: int, old_indices: npt.ArrayLike, new_indices: npt.ArrayLike, rank: int
) -> TransferMetadata:
    old, new = (np.asarray(each)[rank * size : (rank + 1) * size] for each in (old_indices, new_indices))
    if rank < 0 or len(old) != size:
        raise ConfigError(f"ep_rank={rank} is none of {len(np.asarray(old_indices)) // size} ranks")
    mine = [copy for round_ in moves.rounds for copy in round_ if copy.target // size == rank]
    mine.sort(key=lambda copy: copy.expert)
    primary = np.zeros(size, dtype=np.bool_)
    experts, slots = np.full(size, -1, dtype=np.int64), np.full(size, -1, dtype=np.int32)
    for number, copy in enumerate(mine):
        primary[copy.target % size] = True
        experts[number], slots[number] = copy.expert, copy.target % size
    is_unchanged = old == new
    is_local = is_unchanged | (np.isin(new, old) & (new != -1))
    return TransferMetadata(primary, len(mine), experts, slots, is_unchanged, is_local)


def get_ep_ranks_with_experts_batch(
    expert_ids: Iterable[int], num_local_experts: int, old_indices: npt.ArrayLike, new_indices: npt.ArrayLike
) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Who has each expert, and who needs it and has it not.

    Args:
        expert_ids: the experts that are asked about.
        num_local_experts: slots of a rank.
        old_indices: [P], the map in force.
        new_indices: [P], the map to come.

    Returns:
        Two dicts from expert to ranks in ascending order: senders and receivers.

    Raises:
        ConfigError: as `layer_moves` does.
    """
    # Checks both maps.
    layer_moves(num_local_experts, old_indices, new_indices)
    old, new = np.asarray(old_indices), np.asarray(new_indices)
    have, need = {}, {}
    for expert in map(int, expert_ids):
        holders = set((np.flatnonzero(old == expert) // num_local_experts).tolist())
        wanting = set((np.flatnonzero(new == expert) // num_local_experts).tolist())
        have[expert], need[expert] = sorted(holders), sorted(wanting - holders)
    return have, need


def move_to_buffer(
    num_local_experts: int,
    old_indices: npt.ArrayLike,
    new_indices: npt.ArrayLike,
    expert_weights: Iterable[torch.Tensor],
    expert_weights_buffers: Sequence[torch.Tensor],
    cuda_stream: torch.cuda.Stream | None,
    ep_group: ExpertGroup,
    *,
    communicator: EplbCommunicator | None = None,
) -> tuple[BoolArray, BoolArray, RecvMetadata]:
    """Bring what the slots of this rank are to hold into buffers; the weights stay. **Collective.**

    Args:
        num_local_experts: slots of a rank.
        old_indices: [P], the map in force; -1 holds no expert.
        new_indices: [P], the map to come; a slot with -1 is left alone.
        expert_weights: of the layer, [P / G, ...] each, contiguous.
        expert_weights_buffers: like them; the row of a slot comes into the row of that slot.
        cuda_stream: on which rows are copied; None: the current one.
        ep_group: the ranks.
        communicator: what sends rows; None: `create_eplb_communicator(ep_group, None, ...)`.

    Returns:
        [P / G] which slots stay; [P / G] which of them stay or are copied within this rank; what comes from
        others.

    Raises:
        ConfigError: when an argument is wrong; nothing was sent.
        PeerLostError, PeerTimeoutError: when a peer that this rank waits for is dead or late.
    """
    weights = list(expert_weights)
    moves = layer_moves(num_local_experts, old_indices, new_indices)
    rank = rank_of(ep_group)
    found = _metadata(moves, num_local_experts, old_indices, new_indices, rank)
    rows = LayerRows.of(weights)
    brought = rows.bytes_of(expert_weights_buffers)
    if rows.num_slots != num_local_experts:
        raise ConfigError(f"weights of {rows.num_slots} slots for ranks of {num_local_experts}")
    if moves.rounds or moves.local:
        sender = communicator or create_eplb_communicator(ep_group, None, weights, expert_weights_buffers)
        with torch.inference_mode(), torch.cuda.stream(cuda_stream):
            bring_rows(sender, moves, rows.bytes_of(weights), brought, rank)
    received = RecvMetadata(
        found.recv_primary_mask, found.recv_count, found.recv_expert_ids, found.recv_dst_rows
    )
    return found.is_unchanged, found.is_received_locally, received


def move_from_buffer(
    expert_weights: Iterable[torch.Tensor],
    expert_weights_buffers: Sequence[torch.Tensor],
    is_unchanged: BoolArray,
    is_received_locally: BoolArray,
    recv_metadata: RecvMetadata,
    new_indices: npt.ArrayLike,
    ep_rank: int,
) -> None:
    """Write what `move_to_buffer` brought into the weights. Local.

    Args:
        expert_weights: of the layer.
        expert_weights_buffers: what was filled.
        is_unchanged: as `move_to_buffer` gave it.
        is_received_locally: likewise.
        recv_metadata: likewise.
        new_indices: [P], the map to come.
        ep_rank: this rank.

    Raises:
        ConfigError: when weights and buffers are not alike.
    """
    weights = list(expert_weights)
    rows = LayerRows.of(weights)
    pairs = list(zip(rows.bytes_of(weights), rows.bytes_of(expert_weights_buffers), strict=True))
    new = np.asarray(new_indices)[ep_rank * rows.num_slots : (ep_rank + 1) * rows.num_slots]
    count = recv_metadata.recv_count
    experts, slots = (
        each[:count].tolist() for each in (recv_metadata.recv_expert_ids, recv_metadata.recv_dst_rows)
    )
    came = dict(zip(experts, slots, strict=True))
    with torch.inference_mode():
        for slot, expert in enumerate(new.tolist()):
            # What this rank had waits in the slot's own row, and what came in that of the first one.
            source = slot if is_received_locally[slot] else came.get(expert, -1)
            if expert != -1 and source >= 0 and not is_unchanged[slot]:
                for weight, buffer in pairs:
                    weight[slot].copy_(buffer[source])


def transfer_layer(
    old_global_expert_indices: torch.Tensor | npt.ArrayLike,
    new_global_expert_indices: torch.Tensor | npt.ArrayLike,
    expert_weights: Sequence[Iterable[torch.Tensor]],
    expert_weights_buffer: Sequence[torch.Tensor],
    ep_group: ExpertGroup,
    is_profile: bool = False,
    layer: int = 0,
    cuda_stream: torch.cuda.Stream | None = None,
    rank_mapping: Mapping[int, int] | None = None,
) -> Coroutine[Any, Any, tuple[BoolArray, BoolArray, RecvMetadata]]:
    """`move_to_buffer` of one layer, from the maps of all. **Collective.** To be awaited; does not yield.

    Args:
        old_global_expert_indices: [L, P], the map in force.
        new_global_expert_indices: [L, P], the map to come.
        expert_weights: of every layer.
        expert_weights_buffer: one tensor for each weight of a layer.
        ep_group: the ranks.
        is_profile: touch the buffer and move nothing.
        layer: which layer.
        cuda_stream: as for `move_to_buffer`.
        rank_mapping: as for `rearrange_expert_weights_inplace`.

    Returns:
        As `move_to_buffer` does; with `is_profile`, that all stays.

    Raises:
        ConfigError, PeerLostError, PeerTimeoutError: as `move_to_buffer` does.
    """
    world_size = size_of(ep_group)
    old, new = map_of("old", old_global_expert_indices), map_of("new", new_global_expert_indices)
    old, new = widen_maps(old, new, rank_mapping, world_size)
    if old.shape != new.shape or len(expert_weights) != len(old) or not 0 <= layer < len(old):
        raise ConfigError(
            f"layer {layer} of maps {list(old.shape)} and {list(new.shape)} with weights of "
            f"{len(expert_weights)} layers; give as many layers and slots of each"
        )

    after = (old if is_profile else new)[layer]
    size = old.shape[1] // world_size

    async def transfer() -> tuple[BoolArray, BoolArray, RecvMetadata]:
        if is_profile:
            with torch.inference_mode():
                for buffer in expert_weights_buffer:
                    buffer.zero_()
        return move_to_buffer(
            size, old[layer], after, expert_weights[layer], expert_weights_buffer, cuda_stream, ep_group
        )

    return transfer()
