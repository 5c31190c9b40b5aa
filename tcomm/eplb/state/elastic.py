"""Ranks that join: what they are told."""

from __future__ import annotations

import dataclasses

import torch

from tcomm.eplb.state.meeting import UNKNOWN, Errand, Meeting, Visit, fingerprint
from tcomm.errors import ConfigError

__all__ = ["SharedState", "receive_state", "share_state"]


@dataclasses.dataclass(frozen=True, eq=False)
class SharedState:
    """What ranks that join are told."""

    loads: list[torch.Tensor]
    """Of each model: [L, E] int64, over all ranks."""
    maps: list[torch.Tensor]
    """Of each model: [L, P] int64, the map in force."""
    slots_per_rank: int
    """Slots of a layer on one rank."""
    is_single: bool
    """Whether the state that tells was built for a single model."""


def share_state(meeting: Meeting, step: int, mine: SharedState) -> SharedState:
    """Tell those who join, and sum the loads. **Collective** with `receive_state`.

    Args:
        meeting: of those who stay and those who join.
        step: how often this rank has stepped.
        mine: what this rank has counted, and the maps, which are the same on all that tell.

    Returns:
        The same with loads of all ranks.

    Raises:
        CollectiveMismatchError: when ranks are on another errand or at another step.
    """
    facts = fingerprint(*(phy2log.numpy() for phy2log in mine.maps))
    return _exchange(meeting, meeting.agree(Errand.SHARE, step, len(mine.maps), facts), mine)


def receive_state(meeting: Meeting) -> SharedState:
    """Be told, as a rank that joins. **Collective** with `share_state`.

    Raises:
        CollectiveMismatchError: when ranks are on another errand.
        ConfigError: when all ranks join: nobody has a state.
    """
    return _exchange(meeting, meeting.agree(Errand.SHARE, UNKNOWN, UNKNOWN, UNKNOWN), None)


def _exchange(meeting: Meeting, visits: list[Visit], mine: SharedState | None) -> SharedState:
    telling = [rank for rank, visit in enumerate(visits) if visit.step != UNKNOWN]
    if not telling:
        raise ConfigError("every rank of the group waits to be told loads and maps; some rank must have them")
    source = telling[0]
    facts = torch.zeros((visits[source].num_models, 5), dtype=torch.int64, device="cpu")
    if mine is not None:
        for row, load, phy2log in zip(facts, mine.loads, mine.maps, strict=True):
            numbers = [*load.shape, phy2log.shape[1], mine.slots_per_rank, mine.is_single]
            row.copy_(torch.tensor(numbers, dtype=torch.int64, device="cpu"))
    facts = meeting.hand_out(facts, source)
    loads, maps = [], []
    for index, (num_layers, num_experts, num_slots, _, _) in enumerate(facts.tolist()):
        load = torch.zeros((num_layers, num_experts), dtype=torch.int64, device="cpu")
        phy2log = torch.zeros((num_layers, num_slots), dtype=torch.int64, device="cpu")
        if mine is not None:
            load.copy_(mine.loads[index])
            phy2log.copy_(mine.maps[index])
        loads.append(meeting.total(load))
        maps.append(meeting.hand_out(phy2log, source))
    slots_per_rank, is_single = (int(number) for number in facts[0, 3:]) if len(facts) else (0, 0)
    return SharedState(loads, maps, slots_per_rank, bool(is_single))
