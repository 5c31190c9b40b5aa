"""Layers in the middle of a search, and the best of many steps for each of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from tcomm.eplb.shapes import FloatArray, IntArray

__all__ = ["Layers", "Step", "best_step"]


@dataclasses.dataclass
class Layers:
    """The layers under way, A of them, and how they stand."""

    index: IntArray
    """[A]: which layers they are."""
    phy2log: IntArray
    """[A, P]."""
    counts: IntArray
    """[A, E]: replicas of each expert."""
    load: FloatArray
    """[A, E]."""
    slot_load: FloatArray
    """[A, P]."""
    gpu_load: FloatArray
    """[A, G]."""
    hottest: IntArray
    """[A]: the busiest GPU."""
    peak: FloatArray
    """[A]: its load."""
    spent: IntArray
    """[A]: moves so far."""
    past_pairs: npt.NDArray[np.bool_]
    """[A]: whether an exchange of two slots for two has been tried in vain."""
    held: npt.NDArray[np.bool_] | None
    """[A, G, E]: whether a GPU had an expert at first; None: moves are free."""

    def part(self, which: Any) -> Layers:
        """Those of a mask or an index [A]."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Layers(*(None if value is None else value[which] for value in values))  # type: ignore[arg-type]

    def weigh(self) -> None:
        """Bring the loads of slots and GPUs up to date after numbers of replicas have changed."""
        self.slot_load = np.take_along_axis(self.load / self.counts, self.phy2log, axis=1)
        self.gpu_load = self.slot_load.reshape(*self.gpu_load.shape, -1).sum(axis=2)

    def look(self) -> None:
        """Bring the busiest GPU and moves up to date after a step."""
        self.hottest = self.gpu_load.argmax(axis=1)
        self.peak = self.gpu_load[np.arange(len(self.index)), self.hottest]
        if self.held is not None:
            self.spent = self.moved().sum(axis=1)

    def swap(self, row: IntArray, one: IntArray, other: IntArray) -> None:
        """Exchange what slots hold, in some rows; of a row each GPU may be part of one swap.

        Args:
            row: [N], rows of the layers.
            one: [N], slots.
            other: [N], slots to exchange them with.
        """
        size = self.slots_per_gpu
        for values in (self.phy2log, self.slot_load):
            values[row, one], values[row, other] = values[row, other], values[row, one]
        more = self.slot_load[row, one] - self.slot_load[row, other]
        self.gpu_load[row, one // size] += more
        self.gpu_load[row, other // size] -= more

    @property
    def slots_per_gpu(self) -> int:
        """Slots of a GPU."""
        return int(self.phy2log.shape[1] // self.gpu_load.shape[1])

    def per_slot(self, of_gpus: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """[..., G] as [..., P]: what is true of a slot's GPU."""
        return np.repeat(of_gpus, self.slots_per_gpu, axis=-1)

    def hot_slots(self) -> IntArray:
        """[A, S]: the slots of the busiest GPU."""
        return self.hottest[:, None] * self.slots_per_gpu + np.arange(self.slots_per_gpu)

    def moved(self) -> npt.NDArray[np.bool_]:
        """[A, P]: whether a slot's expert was not on its GPU at first."""
        assert self.held is not None
        gpus = self.per_slot(np.arange(self.gpu_load.shape[1]))
        there: npt.NDArray[np.bool_] = self.held[np.arange(len(self.index))[:, None], gpus, self.phy2log]
        return ~there

    def missing(self, experts: IntArray) -> npt.NDArray[np.bool_]:
        """[A, S, P]: whether each slot's GPU was without each of the experts [A, S] at first."""
        assert self.held is not None
        there = self.held[np.arange(len(self.index))[:, None], :, experts]
        missing: npt.NDArray[np.bool_] = self.per_slot(~there)
        return missing


@dataclasses.dataclass(frozen=True)
class Step:
    """The best step of each layer: a slot of the busiest GPU and another one."""

    gain: FloatArray
    """[A]: how far the GPUs that it touches stay below the peak; not above 0 where there is no step."""
    hot_slot: IntArray
    """[A]."""
    other_slot: IntArray
    """[A]."""


def best_step(peaks: FloatArray, costs: IntArray | None, layers: Layers, max_moves: int) -> Step:
    """The step of each layer that gains most, for a move where moves cost.

    Args:
        peaks: [A, S, P], the load of the busiest GPU touched by each step; written to.
        costs: [A, S, P], moves of each step, which may be below 0; None: all the same.
        layers: what the steps are of.
        max_moves: moves of a layer, all steps together.
    """
    rows, num_slots = np.arange(len(peaks)), peaks.shape[2]
    if costs is None:
        best = peaks.reshape(len(peaks), -1).argmin(axis=1)
    else:
        gains = layers.peak[:, None, None] - peaks
        gains[costs > (max_moves - layers.spent)[:, None, None]] = -np.inf
        # What costs nothing is not worth infinitely much: a step is a step.
        gains /= np.maximum(costs, 0.5)
        best = gains.reshape(len(peaks), -1).argmax(axis=1)
        peaks = np.where(np.isneginf(gains), np.inf, peaks)
    hot, other = np.divmod(best, num_slots)
    gain = layers.peak - peaks.reshape(len(peaks), -1)[rows, best]
    return Step(gain, layers.hot_slots()[rows, hot], other)
