"""An uneven share of an expert's tokens for each of its replicas, as full as its GPU leaves room for."""

from __future__ import annotations

import numpy as np

from tcomm.eplb.maps import gpu_loads, logical_maps
from tcomm.eplb.shapes import FloatArray, IntArray, LoadArray, Shape, checked_load, checked_map

__all__ = ["split_tokens"]

_PROGRESS = 1e-6
"""Of the peak: a sweep that changes no GPU's load by more is the last."""


def split_tokens(load: LoadArray, phy2log: LoadArray, shape: Shape, sweeps: int = 20) -> FloatArray:
    """Shares that make the busiest GPU as little busy as the map allows, nearly.

    One expert after another pours its tokens anew over the GPUs that have it, as water into vessels: up to
    one level, and nothing into those that stand higher. Sweeps over all experts end when all levels stay.

    Args:
        load: [L, E].
        phy2log: [L, P].
        shape: the numbers.
        sweeps: rounds over all experts, at most.

    Returns:
        [L, P]: the part of its expert's tokens that each slot takes; those of an expert sum to 1. Of two
        replicas on one GPU the second takes nothing, unless all shares of the layer are even.

    Raises:
        ConfigError: when load or map is none.
    """
    values = checked_load(load, np.float64)
    slots_map = checked_map("phy2log", phy2log, len(values), shape)
    log2phy, counts = logical_maps(slots_map, values.shape[1])
    first = _first_on_gpu(log2phy, shape.slots_per_gpu)
    vessels = _Vessels(values, log2phy, first, shape)
    # The heaviest first; experts with one replica change nothing and fill up rows.
    order = np.argsort(np.where(counts > 1, -values, 1), axis=1, kind="stable")
    order = order[:, : int((counts > 1).sum(axis=1).max(initial=0))]
    for _ in range(sweeps):
        before = vessels.levels.copy()
        for experts in order.T:
            vessels.pour(experts)
        if (np.abs(vessels.levels - before) <= _PROGRESS * before.max(axis=1, keepdims=True)).all():
            break
    share = vessels.shares(slots_map.shape)
    # Where sweeps ended too early, an even share may still be better.
    even = 1 / np.take_along_axis(counts, slots_map, axis=1)
    peaks = [gpu_loads(slots_map, values, shape.num_gpus, part).max(axis=1) for part in (share, even)]
    return np.where((peaks[0] <= peaks[1])[:, None], share, even)


def _first_on_gpu(log2phy: IntArray, slots_per_gpu: int) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """[L, E, X]: whether a place has a slot, and the first one of its GPU. Slots of an expert rise."""
    gpu = log2phy // slots_per_gpu
    first = log2phy >= 0
    first[:, :, 1:] &= gpu[:, :, 1:] != gpu[:, :, :-1]
    return first


class _Vessels:
    """The loads of GPUs, and what each expert has poured into which of them."""

    def __init__(
        self,
        load: FloatArray,
        log2phy: IntArray,
        usable: np.ndarray[tuple[int, ...], np.dtype[np.bool_]],
        shape: Shape,
    ) -> None:
        self._load, self._slots, self._usable = load, log2phy, usable
        self._rows = np.arange(len(load))
        self._gpus = np.where(usable, log2phy // shape.slots_per_gpu, 0)
        self._part = usable / np.maximum(usable.sum(axis=2, keepdims=True), 1)
        self.levels = np.zeros((len(load), shape.num_gpus))
        np.add.at(self.levels, (self._rows[:, None, None], self._gpus), self._part * load[:, :, None])

    def pour(self, experts: IntArray) -> None:
        """Let one expert [L] of each layer choose anew."""
        rows = self._rows
        usable, gpus, amount = (
            self._usable[rows, experts],
            self._gpus[rows, experts],
            self._load[rows, experts],
        )
        old = self._part[rows, experts] * amount[:, None]
        # Places that hold nothing all mean GPU 0, and add nothing to it.
        np.subtract.at(self.levels, (rows[:, None], gpus), old)
        stands = np.where(usable, self.levels[rows[:, None], gpus], np.inf)
        rising = np.sort(stands, axis=1)
        reached = (amount[:, None] + np.cumsum(rising, axis=1)) / np.arange(1, rising.shape[1] + 1)
        level = reached.min(axis=1)
        new = np.maximum(level[:, None] - stands, 0)
        np.add.at(self.levels, (rows[:, None], gpus), new)
        total = new.sum(axis=1)
        full = total > 0
        self._part[rows[full], experts[full]] = new[full] / total[full, None]

    def shares(self, shape: tuple[int, ...]) -> FloatArray:
        """[L, P]."""
        share = np.zeros(shape)
        layer, expert, place = np.nonzero(self._slots >= 0)
        share[layer, self._slots[layer, expert, place]] = self._part[layer, expert, place]
        return share
