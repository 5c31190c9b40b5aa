"""How a state rearranges experts: what its ranks say to one another, in which order."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch

from tcomm.eplb.moving.creation import create_eplb_communicator
from tcomm.eplb.moving.making import make_mover
from tcomm.eplb.moving.mover import WeightMover
from tcomm.eplb.moving.rank_mapping import RankChange, rank_change
from tcomm.eplb.shapes import IntArray
from tcomm.eplb.state.elastic import SharedState, share_state
from tcomm.eplb.state.meeting import UNKNOWN, Errand, Meeting, Visit, checked_group, fingerprint
from tcomm.eplb.state.model_state import EplbModelState
from tcomm.eplb.state.rearrangement import PlannedMove, carry_out, plain_mode, plan_move
from tcomm.eplb.state.single import SingleModel
from tcomm.eplb.state.statistics import EplbStats, LoadStatistics, rank_loads
from tcomm.groups.parallel.coordinator import GroupCoordinator
from tcomm.groups.parallel.eplb_config import EPLBConfig
from tcomm.groups.parallel.parallel_state import get_ep_group

__all__ = ["Rearranging", "count_nodes"]

logger = logging.getLogger("tcomm")


def count_nodes(hosts: Sequence[int]) -> int:
    """How many nodes ranks are on that share them evenly, one node's ranks behind another's.

    Args:
        hosts: of each rank, the same number for ranks of one node.

    Returns:
        0 where nodes do not share them so.
    """
    firsts = [rank for rank, host in enumerate(hosts) if rank == 0 or host != hosts[rank - 1]]
    size = len(hosts) // len(firsts)
    is_even = size * len(firsts) == len(hosts) and firsts == list(range(0, len(hosts), size))
    return len(firsts) if is_even and len(set(hosts)) == len(firsts) else 0


class Rearranging(SingleModel):
    """The collectives of a state, over its expert parallel group.

    Attributes:
        num_steps: how often this rank has stepped since the ranks last came or went; compared whenever
            ranks meet.
    """

    policy_name: str
    num_steps: int
    _group: GroupCoordinator | None
    _config: EPLBConfig

    @property
    def ep_group(self) -> GroupCoordinator:
        """The group that was given, or the expert parallel group of now. Assign the next one to it.

        Raises:
            ConfigError: when it is no `GroupCoordinator`.
        """
        return get_ep_group() if self._group is None else self._group

    @ep_group.setter
    def ep_group(self, group: GroupCoordinator) -> None:
        self._group = checked_group(group)
        # What broke the group before may have let some ranks count a step more.
        self.num_steps = 0

    def make_mover(self, group: GroupCoordinator, weights: Sequence[torch.Tensor]) -> WeightMover:
        """What moves the weights of a model, by `eplb_config.communicator`; a subclass may know better.

        **Collective.**

        Args:
            group: whose ranks.
            weights: of one layer, on this rank.

        Raises:
            NotOfferedError: when there is no such communicator here.
            ConfigError, CapabilityError, RendezvousError: as `make_mover` of `tcomm.eplb.moving` does.
        """
        backend, communicator = self._config.communicator, None
        if backend is not None:
            communicator = create_eplb_communicator(group, backend, weights, timeout=group.timeout)
        return make_mover(group, weights, timeout=group.timeout, communicator=communicator)

    def _mover(self, state: EplbModelState) -> WeightMover:
        """Of the group of now; that of a group before is closed."""
        group = self.ep_group
        if state.mover is None or state.mover_group is not group:
            state.close()
            assert state.model is not None
            with plain_mode():
                state.mover = self.make_mover(group, list(state.model.expert_weights[0]))
            state.mover_group = group
        return state.mover

    def _reserve(self) -> None:
        """Take the memory that a rearrangement takes, and rearrange nothing. **Collective.**"""
        Meeting(self.ep_group).agree(Errand.PROFILE, self.num_steps, len(self.model_states))
        with plain_mode():
            for state in self.model_states.values():
                if state.model is not None and len(state.model.expert_weights):
                    self._mover(state).reserve(list(state.model.expert_weights[0]))

    def _tell_statistics(self) -> None:
        """Find out how even the load of this pass is; rank 0 logs it. **Collective.**"""
        meeting, states = self._meet(Errand.STATISTICS)
        for state in states:
            own_rank = meeting.rank if state.counts_own_slots else None
            loads = meeting.total(rank_loads(state.expert_load_pass, meeting.num_ranks, own_rank))
            state.last_statistics = statistics = LoadStatistics.of(loads)
            if meeting.rank == 0:
                logger.info(
                    "expert load of %sstep %d: avg_tokens=%.2f, max_tokens=%d, balancedness=%.4f",
                    state.title, self.num_steps + 1, statistics.avg_tokens, statistics.max_tokens,
                    statistics.balancedness,
                )  # fmt: skip

    def _gather_loads(self, mapping: Mapping[int, int] | None) -> list[torch.Tensor]:
        """Of each model: [L, E], over all ranks and the steps of the window. **Collective.**"""
        meeting, states = self._meet(Errand.LOADS, mapping)
        return [meeting.total(state.expert_loads(meeting.rank)) for state in states]

    def _meet(
        self, errand: Errand, mapping: Mapping[int, int] | None = None
    ) -> tuple[Meeting, list[EplbModelState]]:
        """Meet the ranks that the experts are on."""
        meeting, states = Meeting(self.ep_group), list(self.model_states.values())
        for state in states:
            rank_change(mapping, state.num_ranks, meeting.num_ranks)
        meeting.agree(errand, self.num_steps, len(states))
        return meeting, states

    def _share(self, is_single: bool) -> list[torch.Tensor]:
        """Tell ranks that join; returns the loads. **Collective** with `recv_state`."""
        meeting, states = Meeting(self.ep_group), list(self.model_states.values())
        mine = SharedState(
            loads=[state.expert_loads(meeting.rank) for state in states],
            maps=[torch.from_numpy(state.phy2log()) for state in states],
            slots_per_rank=states[0].slots_per_rank if states else 0,
            is_single=is_single,
        )
        return share_state(meeting, self.num_steps, mine).loads

    def _rearrange_model(
        self,
        state: EplbModelState,
        load: torch.Tensor,
        mapping: Mapping[int, int] | None,
        *,
        joins: bool = False,
    ) -> None:
        """Plan and move one model's experts. **Collective.**

        Args:
            state: of the model.
            load: [L, E] int64, the same on all ranks.
            mapping: the new rank of each old one, as for `rank_change`.
            joins: whether this rank is new, and cannot know how often the others stepped.
        """
        meeting = Meeting(self.ep_group)
        step = UNKNOWN if joins else self.num_steps
        before, change = self._consult(meeting, state, load, mapping, step)
        assert state.eplb_stats is not None
        move = plan_move(before, state.eplb_stats, self.policy_name, change)
        meeting.agree(Errand.MOVE, step, facts=fingerprint(move.after))
        if not change.is_none and not change.is_before:
            state.adopt(move.before)
            state.own_rank = meeting.rank
        seconds = carry_out(state, move, self._mover)
        if not change.is_none:
            self._settle(state, move, meeting.rank)
        self._report(state, move, seconds)

    def _consult(
        self,
        meeting: Meeting,
        state: EplbModelState,
        load: torch.Tensor,
        mapping: Mapping[int, int] | None,
        step: int,
    ) -> tuple[IntArray, RankChange]:
        """Agree on what a plan is made from; gives the map in force and what becomes of the ranks."""
        change = rank_change(mapping, state.num_ranks, meeting.num_ranks)
        state.check_room(change.num_ranks * state.slots_per_rank)
        before = state.phy2log()
        visits = meeting.agree(Errand.PLAN, step, facts=fingerprint(before, load.numpy()))
        state.eplb_stats = self._stats(state, load, change, visits)
        return before, change

    def _report(self, state: EplbModelState, move: PlannedMove, seconds: float) -> None:
        assert state.eplb_stats is not None
        state.last_expert_load = load = state.eplb_stats.global_expert_load_window
        state.last_rearrangement = report = move.report(load.numpy(), seconds)
        if self.ep_group.rank_in_group == 0:
            logger.info("experts of %srearranged at step %d: %s", state.title, self.num_steps, report)

    def _stats(
        self, state: EplbModelState, load: torch.Tensor, change: RankChange, visits: list[Visit]
    ) -> EplbStats:
        assert state.model is not None
        ranks = change.old_ranks if change.is_before else range(change.num_ranks)
        hosts = [visits[rank].host for rank in ranks]
        num_groups, num_nodes = state.model.num_expert_groups, count_nodes(hosts)
        if not num_nodes:
            logger.warning(
                "%d ranks are on %d nodes, which do not share them evenly and in order: any expert may be on "
                "any rank", len(hosts), len(set(hosts)),
            )  # fmt: skip
            num_groups = num_nodes = 1
        num_slots = change.num_ranks * state.slots_per_rank
        return EplbStats(load, num_slots, num_groups, num_nodes, change.num_ranks)

    @staticmethod
    def _settle(state: EplbModelState, move: PlannedMove, rank: int) -> None:
        """Go by the new ranks from now on, and tell the model how many slots there are."""
        if move.change.is_before:
            state.adopt(move.plan.phy2log)
            state.own_rank = move.change.new_ranks[rank]
        state.tell_model()
