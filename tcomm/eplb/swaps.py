"""Steps that exchange what two slots hold, or two pairs of slots."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tcomm.eplb.layers import Layers, Step, best_step

__all__ = ["best_double_swap", "best_swap"]

_PARTNERS = 2
"""GPUs with which pairs are exchanged, the least busy ones."""
_MOST_SLOTS = 12
"""Of a GPU, the heaviest, of which pairs are made: 66 of them."""


def best_swap(layers: Layers, away: npt.NDArray[np.bool_] | None, max_moves: int) -> Step:
    """The best exchange between a slot of the busiest GPU and one of another GPU.

    Args:
        layers: as they stand.
        away: [A, P], slots that may not be touched; None: all may.
        max_moves: moves of a layer.
    """
    hot_slots = layers.hot_slots()
    hot_load = np.take_along_axis(layers.slot_load, hot_slots, axis=1)
    half = (layers.peak[:, None] - layers.gpu_load) / 2
    # Both GPUs end at their mean if what the slots differ by is half of what the GPUs differ by.
    wanted = layers.slot_load + layers.per_slot(half)
    peaks = hot_load[:, :, None] - wanted[:, None, :]
    np.abs(peaks, out=peaks)
    mean = layers.per_slot(layers.gpu_load + half)
    if away is not None:
        mean[away] = np.inf
    peaks += mean[:, None, :]
    costs = None
    if layers.held is not None:
        rows = np.arange(len(layers.index))
        moved = layers.moved().astype(np.int64)
        comes = ~np.take_along_axis(layers.held[rows, layers.hottest], layers.phy2log, axis=1) - moved
        goes = layers.missing(np.take_along_axis(layers.phy2log, hot_slots, axis=1))
        costs = goes + comes[:, None, :] - np.take_along_axis(moved, hot_slots, axis=1)[:, :, None]
    return best_step(peaks, costs, layers, max_moves)


def best_double_swap(layers: Layers, away: npt.NDArray[np.bool_] | None) -> tuple[Step, Step]:
    """The best exchange of two slots of the busiest GPU for two of a cool one, where moves are free.

    Args:
        layers: as they stand.
        away: [A, P], slots that may not be touched; None: all may.

    Returns:
        Two swaps, to be done both; their gain is that of both.
    """
    num_rows, num_gpus = layers.gpu_load.shape
    rows, size = np.arange(num_rows), layers.slots_per_gpu
    free = layers.gpu_load.copy()
    if away is not None:
        free[away.reshape(num_rows, num_gpus, size)[:, :, 0]] = np.inf
    partners = np.argsort(free, axis=1, kind="stable")[:, : min(_PARTNERS, num_gpus)]
    gpus = np.concatenate([layers.hottest[:, None], partners], axis=1)
    of_gpus = layers.slot_load.reshape(num_rows, num_gpus, size)[rows[:, None], gpus]
    heaviest = np.argsort(-of_gpus, axis=2, kind="stable")[:, :, :_MOST_SLOTS]
    first, second = np.triu_indices(heaviest.shape[2], k=1)
    loads = np.take_along_axis(of_gpus, heaviest, axis=2)
    pairs = loads[:, :, first] + loads[:, :, second]
    if not len(first):
        nothing = Step(np.zeros(num_rows), *(layers.hot_slots()[:, 0],) * 2)
        return nothing, nothing
    half = (layers.peak[:, None] - free[rows[:, None], partners]) / 2
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
