"""Steps that exchange what two slots hold."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tcomm.eplb.layers import Layers, Step, best_step

__all__ = ["best_swap"]


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
