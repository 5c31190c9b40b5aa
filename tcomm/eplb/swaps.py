"""Steps that exchange what two slots hold, or two pairs of slots."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from tcomm.eplb.layers import Layers, Step, best_step
from tcomm.eplb.shapes import IntArray

__all__ = ["best_double_swap", "best_swap", "swap_in_pairs"]

_PROGRESS = 1e-6
"""Of what would be ideal: less is not worth a swap."""
_PARTNERS = 2
"""GPUs with which pairs are exchanged, the least busy ones."""
_MOST_SLOTS = 8
"""Of a GPU, the heaviest, of which pairs are made: 28 of them."""


def swap_in_pairs(layers: Layers, num_nodes: int) -> bool:
    """Pair each node's busiest GPU with its least busy one, the next with the next, and swap in each pair.

    Args:
        layers: as they stand, and then as they stand after the swaps.
        num_nodes: nodes.

    Returns:
        Whether any pair had a swap that relieves the busier of the two.
    """
    num_rows, num_gpus = len(layers.index) * num_nodes, layers.gpu_load.shape[1] // num_nodes
    size = layers.slots_per_gpu
    gpu_load = layers.gpu_load.reshape(num_rows, num_gpus)
    slot_load = layers.slot_load.reshape(num_rows, num_gpus, size)
    falling = np.argsort(-gpu_load, axis=1, kind="stable")
    rows, half = np.arange(num_rows)[:, None], num_gpus // 2
    hot, cool = falling[:, :half], falling[:, ::-1][:, :half]
    wanted = (gpu_load[rows, hot] - gpu_load[rows, cool]) / 2
    shifted = slot_load[rows, hot] - wanted[:, :, None]
    miss = shifted[:, :, :, None] - slot_load[rows, cool][:, :, None, :]
    np.abs(miss, out=miss)
    miss = miss.reshape(*hot.shape, size * size)
    best = miss.argmin(axis=2)
    least = np.take_along_axis(miss, best[:, :, None], axis=2)[:, :, 0]
    row, pair = np.nonzero(least < wanted * (1 - _PROGRESS))
    hot_slot, cool_slot = np.divmod(best[row, pair], size)
    node = (row % num_nodes) * num_gpus
    ours = (node + hot[row, pair]) * size + hot_slot
    theirs = (node + cool[row, pair]) * size + cool_slot
    layers.swap(row // num_nodes, ours, theirs)
    return bool(len(row))


def _coolest(layers: Layers, away: npt.NDArray[np.bool_] | None, number: int) -> IntArray:
    """[A, number]: the least busy GPUs of the busiest one's node."""
    loads = layers.gpu_load if away is None else np.where(away, np.inf, layers.gpu_load)
    return np.argsort(loads, axis=1)[:, :number]


def best_swap(layers: Layers, away: npt.NDArray[np.bool_] | None, max_moves: int) -> Step:
    """The best exchange between a slot of the busiest GPU and one of a less busy GPU.

    Where moves are free only cool GPUs are looked at, which is faster and loses next to nothing.

    Args:
        layers: as they stand.
        away: [A, G], GPUs that may not be touched; None: all may.
        max_moves: moves of a layer.
    """
    num_rows, num_gpus = layers.gpu_load.shape
    rows, size = np.arange(num_rows), layers.slots_per_gpu
    cool = _coolest(layers, away, num_gpus if layers.held is not None else max(8, num_gpus // 4))
    cool_load = layers.gpu_load[rows[:, None], cool]
    slot_load = layers.slot_load.reshape(num_rows, num_gpus, size)
    # Both GPUs end at their mean if what the slots differ by is half of what the GPUs differ by.
    half = (layers.peak[:, None] - cool_load) / 2
    wanted = slot_load[rows[:, None], cool] + half[:, :, None]
    peaks = slot_load[rows, layers.hottest][:, :, None, None] - wanted[:, None]
    np.abs(peaks, out=peaks)
    mean = cool_load + half
    if away is not None:
        mean[away[rows[:, None], cool]] = np.inf
    peaks += mean[:, None, :, None]
    slots = (cool[:, :, None] * size + np.arange(size)).reshape(num_rows, -1)
    costs = None if layers.held is None else _swap_costs(layers, slots)
    step = best_step(peaks.reshape(num_rows, size, -1), costs, layers, max_moves)
    return dataclasses.replace(step, other_slot=slots[rows, step.other_slot])


def _swap_costs(layers: Layers, slots: IntArray) -> IntArray:
    """[A, S, P]: moves of each swap of a slot of the busiest GPU with one of `slots` [A, P]."""
    assert layers.held is not None
    moved = layers.moved().astype(np.int64)
    hot_slots = layers.hot_slots()
    others = np.take_along_axis(layers.phy2log, slots, axis=1)
    had = np.take_along_axis(layers.held[np.arange(len(slots)), layers.hottest], others, axis=1)
    comes = ~had - np.take_along_axis(moved, slots, axis=1)
    missing = layers.missing(np.take_along_axis(layers.phy2log, hot_slots, axis=1))
    goes = np.take_along_axis(missing, slots[:, None, :], axis=2)
    costs: IntArray = goes + comes[:, None, :] - np.take_along_axis(moved, hot_slots, axis=1)[:, :, None]
    return costs


def best_double_swap(layers: Layers, away: npt.NDArray[np.bool_] | None) -> tuple[Step, Step]:
    """The best exchange of two slots of the busiest GPU for two of a cool one, where moves are free.

    Args:
        layers: as they stand.
        away: [A, G], GPUs that may not be touched; None: all may.

    Returns:
        Two swaps, to be done both; their gain is that of both.
    """
    num_rows, num_gpus = layers.gpu_load.shape
    rows, size = np.arange(num_rows), layers.slots_per_gpu
    partners = _coolest(layers, away, _PARTNERS)
    gpus = np.concatenate([layers.hottest[:, None], partners], axis=1)
    of_gpus = layers.slot_load.reshape(num_rows, num_gpus, size)[rows[:, None], gpus]
    heaviest = np.argsort(-of_gpus, axis=2, kind="stable")[:, :, :_MOST_SLOTS]
    first, second = np.triu_indices(heaviest.shape[2], k=1)
    loads = np.take_along_axis(of_gpus, heaviest, axis=2)
    pairs = loads[:, :, first] + loads[:, :, second]
    if not len(first):
        nothing = Step(np.zeros(num_rows), *(layers.hot_slots()[:, 0],) * 2)
        return nothing, nothing
    half = (layers.peak[:, None] - layers.gpu_load[rows[:, None], partners]) / 2
    if away is not None:
        half[away[rows[:, None], partners]] = 0
    peaks = np.abs(pairs[:, :1, :, None] - (pairs[:, 1:] + half[:, :, None])[:, :, None, :])
    peaks += (layers.peak[:, None] - half)[:, :, None, None]
    best = peaks.reshape(num_rows, -1).argmin(axis=1)
    partner, hot, other = np.unravel_index(best, peaks.shape[1:])
    gain = layers.peak - peaks.reshape(num_rows, -1)[rows, best]
    return tuple(  # type: ignore[return-value]
        Step(
            gain,
            layers.hottest * size + heaviest[rows, 0, members[hot]],
            partners[rows, partner] * size + heaviest[rows, 1 + partner, members[other]],
        )
        for members in (first, second)
    )
