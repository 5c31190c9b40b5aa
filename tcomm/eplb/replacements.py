"""Steps that give an expert one replica more, in place of a replica of another."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tcomm.eplb.layers import Layers, Step, best_step
from tcomm.eplb.shapes import FloatArray, IntArray

__all__ = ["best_replacement", "peak_elsewhere"]


def peak_elsewhere(phy2log: IntArray, slot_peak: FloatArray) -> FloatArray:
    """The highest value among the other slots with the same expert: [A, P], -inf where there is none."""
    order = np.lexsort((slot_peak, phy2log), axis=-1)
    experts = np.take_along_axis(phy2log, order, axis=1)
    values = np.take_along_axis(slot_peak, order, axis=1)
    # Of each expert the values rise: the last is the highest, and the one before it what the last sees.
    same = np.zeros(values.shape, bool)
    same[:, 1:] = experts[:, 1:] == experts[:, :-1]
    starts = np.flatnonzero(~same)
    ends = np.append(starts[1:], values.size) - 1
    flat = values.reshape(-1)
    elsewhere = np.repeat(flat[ends], ends - starts + 1)
    elsewhere[ends] = np.where(ends > starts, flat[ends - 1], -np.inf)
    found = np.empty_like(values)
    np.put_along_axis(found, order, elsewhere.reshape(values.shape), axis=1)
    return found


def best_replacement(layers: Layers, away: npt.NDArray[np.bool_] | None, max_moves: int) -> Step:
    """The best further replica of an expert of the busiest GPU, in place of a replica that is not the last.

    Args:
        layers: as they stand.
        away: [A, G], GPUs that may not be touched; None: all may.
        max_moves: moves of a layer.
    """
    hot_slots = layers.hot_slots()
    experts = np.take_along_axis(layers.phy2log, hot_slots, axis=1)
    count = np.take_along_axis(layers.counts, experts, axis=1)
    hot_load = np.take_along_axis(layers.slot_load, hot_slots, axis=1)
    thinner = hot_load * count / (count + 1)
    counts_of_slots = np.take_along_axis(layers.counts, layers.phy2log, axis=1)
    slot_peak = layers.per_slot(layers.gpu_load)
    # The replicas that are left of what is replaced take over its tokens.
    burden = layers.slot_load / np.maximum(counts_of_slots - 1, 1)
    elsewhere = peak_elsewhere(layers.phy2log, slot_peak) + burden
    elsewhere[counts_of_slots == 1] = np.inf
    barred = np.zeros(layers.gpu_load.shape, bool) if away is None else away.copy()
    barred[np.arange(len(barred)), layers.hottest] = True
    elsewhere[layers.per_slot(barred)] = np.inf
    peaks = thinner[:, :, None] + (slot_peak - layers.slot_load)[:, None, :]
    np.maximum(peaks, (layers.peak[:, None] - hot_load + thinner)[:, :, None], out=peaks)
    np.maximum(peaks, elsewhere[:, None, :], out=peaks)
    costs = None
    if layers.held is not None:
        costs = layers.missing(experts) - layers.moved().astype(np.int64)[:, None, :]
    return best_step(peaks, costs, layers, max_moves)
