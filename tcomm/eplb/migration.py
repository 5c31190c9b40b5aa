"""From one map to the next: which slots are copied from where, in rounds. Nothing is sent here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import msgspec
import numpy as np

from tcomm.eplb.shapes import IntArray
from tcomm.errors import ConfigError

__all__ = ["Copy", "LayerMoves", "Migration", "migration"]


class Copy(msgspec.Struct, frozen=True, gc=False):
    """The weights of an expert, from one slot to another."""

    expert: int
    source: int
    """Slot that has it in the old map; of `LayerMoves.duplicates` in the new one."""
    target: int
    """Slot that has it in the new map."""


@dataclasses.dataclass(frozen=True)
class LayerMoves:
    """What one layer needs. Sources are what they were before any copy of the layer: read them first."""

    rounds: tuple[tuple[Copy, ...], ...]
    """Copies between ranks. In a round no rank sends twice and none receives twice."""
    local: tuple[Copy, ...]
    """Copies within a rank."""
    duplicates: tuple[Copy, ...]
    """Copies within a rank of what came in a round, after it."""
    missing: tuple[int, ...]
    """Slots whose expert no rank has: somebody must load it."""

    @property
    def has_copies(self) -> bool:
        """Whether anything has to be copied. There are no duplicates of nothing."""
        return bool(self.rounds or self.local)


@dataclasses.dataclass(frozen=True)
class Migration:
    """What all layers need."""

    layers: tuple[LayerMoves, ...]

    @property
    def num_copies(self) -> int:
        """Copies between ranks."""
        return sum(len(round_) for layer in self.layers for round_ in layer.rounds)

    @property
    def num_rounds(self) -> int:
        """Rounds, layer after layer."""
        return sum(len(layer.rounds) for layer in self.layers)


def migration(old: IntArray, new: IntArray, num_gpus: int) -> Migration:
    """What has to be copied so that the slots hold what the new map says.

    A rank receives an expert once, in the first slot that needs it, and only if it had it nowhere. Who sends:
    the ranks that have the expert serve those that need it in order of ranks, each as many, and the first
    ones one more where that does not divide. A layer has as many rounds as its busiest rank has copies.

    Args:
        old: [L, P], the map in force; -1 holds no expert.
        new: [L, P], the map to come; a slot with -1 is left alone.
        num_gpus: ranks that share the slots.

    Raises:
        ConfigError: when the maps are of different shapes, or the ranks do not share the slots evenly.
    """
    before, after = np.asarray(old), np.asarray(new)
    if before.ndim != 2 or before.shape != after.shape:
        raise ConfigError(
            f"maps of shapes {list(before.shape)} and {list(after.shape)} cannot be compared; "
            "give two of [layers, slots]"
        )
    if num_gpus < 1 or before.shape[1] % num_gpus:
        raise ConfigError(f"{before.shape[1]} slots cannot be shared evenly by {num_gpus} GPUs")
    size = before.shape[1] // num_gpus
    return Migration(tuple(map(_layer, before.tolist(), after.tolist(), [size] * len(before))))


def _layer(old: list[int], new: list[int], size: int) -> LayerMoves:
    if old == new:
        return LayerMoves((), (), (), ())
    # Of each expert the first slot on each rank; ranks come in ascending order, as slots do.
    holders: dict[int, dict[int, int]] = {}
    for slot, expert in enumerate(old):
        holders.setdefault(expert, {}).setdefault(slot // size, slot)
    needed: dict[int, dict[int, int]] = {}
    local, duplicates, missing = [], [], []
    for slot, expert in enumerate(new):
        if expert < 0 or expert == old[slot]:
            continue
        rank, where = slot // size, holders.get(expert, {})
        if not where:
            missing.append(slot)
        elif rank in where:
            local.append(Copy(expert, where[rank], slot))
        elif rank in needed.get(expert, {}):
            duplicates.append(Copy(expert, needed[expert][rank], slot))
        else:
            needed.setdefault(expert, {})[rank] = slot
    copies = [
        Copy(expert, holders[expert][sender], slots[receiver])
        for expert, slots in sorted(needed.items())
        for sender, receiver in _assigned(list(holders[expert]), list(slots))
    ]
    return LayerMoves(_rounds(copies, size), tuple(local), tuple(duplicates), tuple(missing))


def _assigned(senders: list[int], receivers: list[int]) -> Iterable[tuple[int, int]]:
    """Each receiver with its sender."""
    each = len(receivers) // len(senders)
    evenly = [sender for sender in senders for _ in range(each)]
    return zip(evenly + senders, receivers, strict=False)


def _rounds(copies: list[Copy], size: int) -> tuple[tuple[Copy, ...], ...]:
    """The edges of a two-sided graph in as few colours as its busiest end needs."""
    # An end is a rank that gives, or one that gets, which has a negative number.
    ends = [(copy.source // size, ~(copy.target // size)) for copy in copies]
    at: dict[int, dict[int, int]] = {end: {} for pair in ends for end in pair}
    colour = [0] * len(copies)
    for edge, (sender, receiver) in enumerate(ends):
        mine, theirs = _free(at[sender]), _free(at[receiver])
        if mine != theirs:
            _make_free(at, ends, colour, receiver, (mine, theirs))
        colour[edge] = mine
        at[sender][mine] = at[receiver][mine] = edge
    rounds: list[list[Copy]] = [[] for _ in range(max(colour, default=-1) + 1)]
    for copy, number in zip(copies, colour, strict=True):
        rounds[number].append(copy)
    return tuple(map(tuple, rounds))


def _free(used: dict[int, int]) -> int:
    number = 0
    while number in used:
        number += 1
    return number


def _make_free(
    at: dict[int, dict[int, int]],
    ends: list[tuple[int, int]],
    colour: list[int],
    end: int,
    pair: tuple[int, int],
) -> None:
    """Exchange two colours along the path from `end`, which lacks the second: it then lacks the first."""
    wanted, other = pair
    edge = at[end].pop(wanted, None)
    while edge is not None:
        # This edge takes the other colour at both its ends; what had it there comes next, the other way.
        colour[edge] = other
        at[end][other] = edge
        sender, receiver = ends[edge]
        end = receiver if end == sender else sender
        following = at[end].get(other)
        at[end][other] = edge
        if following is None:
            del at[end][wanted]
        edge = following
        wanted, other = other, wanted
