"""From a load to other places of experts: planned by all ranks alike, then carried out layer by layer."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from tcomm.eplb.maps import gpu_loads, preserved_slots
from tcomm.eplb.migration import LayerMoves, Migration, migration
from tcomm.eplb.moving.interrupts import interrupts_later
from tcomm.eplb.moving.mover import WeightMover
from tcomm.eplb.moving.rank_mapping import RankChange, renumbered
from tcomm.eplb.plans import Plan, make_plan, plan_of
from tcomm.eplb.shapes import FloatArray, IntArray
from tcomm.errors import ConfigError

if TYPE_CHECKING:
    from tcomm.eplb.state.model_state import EplbModelState
    from tcomm.eplb.state.statistics import EplbStats

__all__ = [
    "LayerSwitch",
    "PlannedMove",
    "Rearrangement",
    "carry_out",
    "plain_mode",
    "plan_move",
    "switches_of",
]


@dataclasses.dataclass(frozen=True)
class Rearrangement:
    """What a rearrangement did."""

    policy: str
    """What planned it."""
    reason: str
    """Why it is this plan."""
    before: float | None
    """Balancedness of the old map on this load; None where it lacks an expert."""
    after: float
    """Of the new map."""
    bound: float
    """What no plan exceeds."""
    num_layers: int
    """Layers that changed."""
    num_copies: int
    """Copies of an expert between ranks."""
    planning_seconds: float
    moving_seconds: float

    def __str__(self) -> str:
        """One line of the log."""
        before = "unknown" if self.before is None else f"{self.before:.3f}"
        return (
            f"balancedness {before} -> {self.after:.3f} (at most {self.bound:.3f}), {self.num_copies} copies "
            f"between ranks in {self.num_layers} layers; planned in {1e3 * self.planning_seconds:.1f} ms by "
            f"{self.policy} ({self.reason}), moved in {1e3 * self.moving_seconds:.1f} ms"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class PlannedMove:
    """Where the experts of a model go, and how they get there."""

    plan: Plan
    """With the ranks that there will be."""
    change: RankChange
    """What becomes of the ranks."""
    before: IntArray
    """[L, slots of all ranks that move weights]: what they hold; -1 for nothing."""
    after: IntArray
    """The same when the weights have been moved."""
    migration: Migration
    """From the one to the other."""

    @property
    def layers(self) -> list[int]:
        """Layers that change, rising."""
        return np.flatnonzero((self.before != self.after).any(axis=1)).tolist()

    def report(self, load: FloatArray, moving_seconds: float) -> Rearrangement:
        """What it came to."""
        plan = self.plan
        mean = gpu_loads(plan.phy2log, load, plan.shape.num_gpus).mean(axis=1)
        old = None
        if (self.before >= 0).all():
            old = _evenness(*_extremes(gpu_loads(self.before, load, self.change.moving_size)))
        return Rearrangement(
            policy=plan.policy,
            reason=plan.reason,
            before=old,
            after=_evenness(mean, mean / plan.balancedness),
            bound=_evenness(mean, mean / plan.bound),
            num_layers=len(self.layers),
            num_copies=self.migration.num_copies,
            planning_seconds=plan.seconds,
            moving_seconds=moving_seconds,
        )


def _extremes(loads: FloatArray) -> tuple[FloatArray, FloatArray]:
    return loads.mean(axis=1), loads.max(axis=1)


def _evenness(mean: FloatArray, peak: FloatArray) -> float:
    """Over all layers, each of which waits for its busiest rank."""
    return float(mean.sum() / peak.sum()) if peak.sum() else 1.0


def plan_move(before: IntArray, stats: EplbStats, policy: str, change: RankChange) -> PlannedMove:
    """Plan where experts go, and how they get there. Local: the same on all ranks that have the same load.

    Args:
        before: [L, P], the map in force, of the old ranks.
        stats: loads and numbers, those of the ranks that there will be.
        policy: a name in `EPLB_POLICIES`.
        change: what becomes of the ranks.

    Raises:
        ConfigError: when load, numbers or policy make no sense; when nobody has the weights of an expert.
    """
    old = renumbered(before, change.new_ranks, change.num_ranks)
    plan = _plan(old, stats, policy)
    held, after = change.widened(before, plan.phy2log)
    moves = migration(held, after, change.moving_size)
    missing = [(layer, slot) for layer, part in enumerate(moves.layers) for slot in part.missing]
    if missing:
        layer, slot = missing[0]
        raise ConfigError(
            f"no rank has expert {after[layer, slot]} of layer {layer} any more; load its weights into some "
            "slot, say so by update_mapping, and rearrange again"
        )
    return PlannedMove(plan, change, held, after, moves)


def _plan(old: IntArray, stats: EplbStats, policy: str) -> Plan:
    load, shape = stats.global_expert_load_window.numpy(), stats.shape
    is_whole = all(len(np.unique(row[row >= 0])) == shape.num_experts for row in old) and bool(
        (old >= 0).all()
    )
    plan = make_plan(load, shape, policy=policy, current=old if is_whole else None)
    if is_whole:
        return plan
    kept = preserved_slots(old, plan.phy2log, shape.num_gpus)
    phy2log = np.take_along_axis(plan.phy2log, kept, axis=1)
    return plan_of(
        phy2log, load, plan.shape, seconds=plan.seconds, policy=policy, reason=f"{plan.reason}; other ranks"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class LayerSwitch:
    """The change of one layer: its weights, then its map."""

    state: EplbModelState
    """Of the model."""
    layer: int
    moves: LayerMoves
    slots: IntArray
    """[P], the expert in each slot afterwards."""
    mover: WeightMover | None
    """What moves the weights; None where none has to move."""

    def prepare(self) -> None:
        """Bring the weights to this rank. **Collective** where some move; see `WeightMover.prepare`."""
        if self.mover is not None:
            with plain_mode():
                self.mover.prepare(self.layer, self.moves, self._weights)

    def settle(self, is_agreed: bool) -> bool:
        """Whether to commit; see `WeightMover.settle`. Where no weights move, this rank's own word counts."""
        return is_agreed if self.mover is None else self.mover.settle(is_agreed)

    def commit(self) -> None:
        """Write weights and map. Local; waits for nobody."""
        if self.mover is not None:
            with plain_mode():
                self.mover.commit(self.layer, self.moves, self._weights)
        self.state.switch_layer(self.layer, self.slots)

    @property
    def _weights(self) -> list[torch.Tensor]:
        assert self.state.model is not None
        return list(self.state.model.expert_weights[self.layer])


def switches_of(
    state: EplbModelState, move: PlannedMove, mover_of: Callable[[EplbModelState], WeightMover]
) -> list[LayerSwitch]:
    """What has to be done, layer after layer.

    Args:
        state: of the model.
        move: where its experts go, the same on all ranks.
        mover_of: gives what moves its weights; called where some have to move, **collective** there.
    """
    parts = [(layer, move.migration.layers[layer]) for layer in move.layers]
    mover = mover_of(state) if any(moves.has_copies for _, moves in parts) else None
    return [
        LayerSwitch(state, layer, moves, move.after[layer], mover if moves.has_copies else None)
        for layer, moves in parts
    ]


def carry_out(
    state: EplbModelState, move: PlannedMove, mover_of: Callable[[EplbModelState], WeightMover]
) -> float:
    """Move weights and switch maps, layer by layer. **Collective.**

    Args:
        state: of the model.
        move: what to do, the same on all ranks.
        mover_of: as for `switches_of`.

    Returns:
        Seconds that it took.

    Raises:
        CommError: what the mover raised. Layers that were moved have their new map, the others the old one.
    """
    start = time.perf_counter()
    done: list[int] = []
    for switch in switches_of(state, move, mover_of):
        try:
            switch.prepare()
            with interrupts_later():
                switch.commit()
                done.append(switch.layer)
        except BaseException as error:
            # What was under way is over for all; the next rearrangement begins with another mover.
            state.close()
            error.add_note(_told(switch.layer, done, state))
            raise
    return time.perf_counter() - start


@contextlib.contextmanager
def plain_mode() -> Iterator[None]:
    """An engine steps in inference mode; what is made here is used outside of it, too."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _told(layer: int, done: list[int], state: EplbModelState) -> str:
    new = f"layers {', '.join(map(str, done))} have their new places" if done else "no layer has changed"
    return f"while the experts of layer {layer} of {state.title}were moved; {new}, the others the old ones"
