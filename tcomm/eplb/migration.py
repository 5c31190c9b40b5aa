"""From one map to the next: which slots are copied from where, in rounds. Nothing is sent here."""

from __future__ import annotations

import dataclasses

import numpy as np

from tcomm.eplb.shapes import IntArray
from tcomm.errors import ConfigError

__all__ = ["Copy", "LayerMoves", "Migration", "migration"]


@dataclasses.dataclass(frozen=True)
class Copy:
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
    holders: dict[int, dict[int, int]] = {}
    for slot, expert in enumerate(old):
        holders.setdefault(expert, {}).setdefault(slot // size, slot)
    needed: dict[int, dict[int, int]] = {}
    local, duplicates, missing = [], [], []
    for slot, expert in enumerate(new):
        if expert in {old[slot], -1}:
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
        for sender, receiver in _assigned(sorted(holders[expert]), sorted(slots))
    ]
    return LayerMoves(_rounds(copies, size), tuple(local), tuple(duplicates), tuple(missing))


def _assigned(senders: list[int], receivers: list[int]) -> list[tuple[int, int]]:
    """Each receiver with its sender."""
    each = len(receivers) // len(senders)
    evenly = each * len(senders)
    pairs = [(senders[i // each], receiver) for i, receiver in enumerate(receivers[:evenly])]
    return pairs + list(zip(senders, receivers[evenly:], strict=False))


def _rounds(copies: list[Copy], size: int) -> tuple[tuple[Copy, ...], ...]:
    """The edges of a two-sided graph in as few colours as its busiest end needs."""
    at: dict[tuple[str, int], dict[int, int]] = {}
    ends = [(("from", copy.source // size), ("to", copy.target // size)) for copy in copies]
    colour = [0] * len(copies)
    for edge, (sender, receiver) in enumerate(ends):
        mine, theirs = _free(at.setdefault(sender, {})), _free(at.setdefault(receiver, {}))
        if mine != theirs:
            _make_free(at, ends, colour, receiver, (mine, theirs))
        colour[edge] = mine
        at[sender][mine] = at[receiver][mine] = edge
    rounds: list[list[Copy]] = [[] for _ in range(max(colour, default=-1) + 1)]
    for edge, copy in enumerate(copies):
        rounds[colour[edge]].append(copy)
    return tuple(map(tuple, rounds))


def _free(used: dict[int, int]) -> int:
    return next(number for number in range(len(used) + 1) if number not in used)


def _make_free(
    at: dict[tuple[str, int], dict[int, int]],
    ends: list[tuple[tuple[str, int], tuple[str, int]]],
    colour: list[int],
    end: tuple[str, int],
    pair: tuple[int, int],
) -> None:
    """Exchange two colours along the path from `end`, which lacks the second: it then lacks the first."""
    path = []
    wanted, other = pair
    while wanted in at[end]:
        edge = at[end][wanted]
        path.append(edge)
        end = ends[edge][1] if ends[edge][0] == end else ends[edge][0]
        wanted, other = other, wanted
    for edge in path:
        for side in ends[edge]:
            at[side].pop(colour[edge], None)
    for edge in path:
        colour[edge] = pair[1] if colour[edge] == pair[0] else pair[0]
    for edge in path:
        for side in ends[edge]:
            at[side][colour[edge]] = edge
