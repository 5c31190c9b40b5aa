"""Local search: from a map to a better one, by steps that relieve the busiest GPU of a layer.

All layers take a step at once, each its best. Where no swap can relieve a layer's busiest GPU, and moves are
free, two of its slots change places with two of a cooler GPU; where that does not help either, one of its
experts gets a further replica instead of one of a cooler expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tcomm.eplb.layers import Layers, Step
from tcomm.eplb.maps import holders, replica_counts
from tcomm.eplb.replacements import best_replacement
from tcomm.eplb.shapes import FloatArray, IntArray, Shape
from tcomm.eplb.swaps import best_double_swap, best_swap, swap_in_pairs

__all__ = ["Budget", "improved"]

_Mask = npt.NDArray[np.bool_]
_EVEN_ENOUGH = 2e-4
"""A busiest GPU this much above what its node allows is left alone."""
_PAIRED_ROUNDS = 4
"""More gain little."""
_PROGRESS = 1e-9
"""Of the peak: less is rounding."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """How far a map may go from the one in force."""

    max_moves: int
    """Slots of a layer whose expert comes from another GPU, at most."""
    price: FloatArray
    """[L]: what one of them costs, in load of the busiest GPU."""


def improved(
    phy2log: IntArray, load: FloatArray, shape: Shape, budget: Budget | None = None, rounds: int = 32
) -> IntArray:
    """The best map that the search meets on its way; experts stay on their nodes.

    Args:
        phy2log: [L, P], where it starts; whole.
        load: [L, E], checked.
        shape: the numbers.
        budget: what a move costs, and how many there may be; None: any number, at no cost.
        rounds: steps of a layer, at most.

    Returns:
        [L, P]; no layer's busiest GPU has more load than at first.
    """
    shape = shape.planned()
    layers = _started(phy2log, load, shape, budget)
    max_moves = phy2log.shape[1] if budget is None else budget.max_moves
    price = np.zeros(len(phy2log)) if budget is None else budget.price
    best, best_value = phy2log.copy(), np.full(len(phy2log), np.inf)
    if not len(phy2log):
        return best
    layers.weigh()
    paired = 0
    while budget is None and paired < _PAIRED_ROUNDS and swap_in_pairs(layers, shape.num_nodes):
        paired += 1
    for round_ in range(rounds + 1):
        layers.look()
        prices = price[layers.index]
        value = layers.peak + layers.spent * prices
        better = value < best_value[layers.index]
        best[layers.index[better]] = layers.phy2log[better]
        best_value[layers.index[better]] = value[better]
        floor = layers.gpu_load.reshape(len(layers.index), shape.num_nodes, -1).mean(axis=2).max(axis=1)
        # No way leads below the mean of the busiest node, and what has been spent stays spent.
        hopeful = floor + layers.spent * prices < best_value[layers.index]
        layers = _only(layers, hopeful & (layers.peak > floor * (1 + _EVEN_ENOUGH)))
        if round_ == rounds or not len(layers.index):
            break
        layers = _stepped(layers, shape, max_moves)
        if not len(layers.index):
            break
    return best


def _started(phy2log: IntArray, load: FloatArray, shape: Shape, budget: Budget | None) -> Layers:
    num_layers = len(phy2log)
    return Layers(
        index=np.arange(num_layers),
        phy2log=phy2log.copy(),
        counts=replica_counts(phy2log, shape.num_experts),
        load=load,
        slot_load=np.empty(phy2log.shape),
        gpu_load=np.empty((num_layers, shape.num_gpus)),
        hottest=np.zeros(num_layers, np.int64),
        peak=np.empty(num_layers),
        spent=np.zeros(num_layers, np.int64),
        past_pairs=np.zeros(num_layers, bool),
        held=None if budget is None else holders(phy2log, shape.num_experts, shape.num_gpus),
    )


def _stepped(layers: Layers, shape: Shape, max_moves: int) -> Layers:
    """Those layers that have a step to take, after it; their busiest GPU is not looked for yet."""
    away = _away(layers, shape)
    went = _swapped(layers, (best_swap(layers, away, max_moves),))
    passed = went | layers.past_pairs
    if layers.held is None and not passed.all():
        done = _for_the_rest(
            layers, away, passed, lambda part, away: _swapped(part, best_double_swap(part, away))
        )
        # Pairs that do not help once hardly ever do later.
        layers.past_pairs |= ~done
        went |= done & ~passed
    if not went.all():
        went = _for_the_rest(layers, away, went, lambda part, away: _replaced(part, away, max_moves))
    return _only(layers, went)


def _for_the_rest(
    layers: Layers, away: _Mask | None, went: _Mask, step: Callable[[Layers, _Mask | None], _Mask]
) -> _Mask:
    """`went`, and which of the other layers took this step, which they try here."""
    if not went.any():
        return step(layers, away)
    rest = np.flatnonzero(~went)
    part = layers.part(rest)
    done = went.copy()
    done[rest] = step(part, None if away is None else away[rest])
    if done[rest].any():
        for name in ("phy2log", "counts", "slot_load", "gpu_load"):
            getattr(layers, name)[rest] = getattr(part, name)
    return done


def _swapped(layers: Layers, swaps: tuple[Step, ...]) -> _Mask:
    """Whether each layer took the step of all these swaps."""
    went = _worthwhile(swaps[0], layers)
    rows = np.flatnonzero(went)
    for swap in swaps:
        layers.swap(rows, swap.hot_slot[rows], swap.other_slot[rows])
    return went


def _replaced(layers: Layers, away: _Mask | None, max_moves: int) -> _Mask:
    """Whether each layer took the step of a replica more."""
    step = best_replacement(layers, away, max_moves)
    went = _worthwhile(step, layers)
    rows = np.flatnonzero(went)
    if len(rows):
        hot, other = step.hot_slot[rows], step.other_slot[rows]
        more, fewer = layers.phy2log[rows, hot], layers.phy2log[rows, other]
        layers.phy2log[rows, other] = more
        layers.counts[rows, more] += 1
        layers.counts[rows, fewer] -= 1
        layers.weigh()
    return went


def _only(layers: Layers, which: _Mask) -> Layers:
    return layers if which.all() else layers.part(which)


def _worthwhile(step: Step, layers: Layers) -> _Mask:
    mask: _Mask = step.gain > layers.peak * _PROGRESS
    return mask


def _away(layers: Layers, shape: Shape) -> _Mask | None:
    """[A, G]: GPUs on other nodes than the busiest one."""
    if shape.num_nodes == 1:
        return None
    gpus_of_node = shape.num_gpus // shape.num_nodes
    node = np.arange(shape.num_gpus) // gpus_of_node
    mask: _Mask = node != (layers.hottest // gpus_of_node)[:, None]
    return mask
