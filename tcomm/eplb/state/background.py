"""Rearranging beside the forward pass, as a state does it. Protocol: `docs/eplb/async.md`."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Mapping, Sequence

import torch

from tcomm.eplb.state.meeting import Errand, Meeting
from tcomm.eplb.state.model_state import EplbModelState
from tcomm.eplb.state.rearrangement import LayerSwitch, PlannedMove, plan_move, switches_of
from tcomm.eplb.state.rearranging import Rearranging
from tcomm.eplb.state.worker import Worker
from tcomm.errors import UsageError

__all__ = ["Background", "start_async_worker"]

_SECONDS_BETWEEN_LOOKS = 0.001


@dataclasses.dataclass(eq=False)
class _UnderWay:
    """A rearrangement that a thread prepares."""

    begin: float
    moves: list[tuple[EplbModelState, PlannedMove]] = dataclasses.field(default_factory=list)


class Background(Rearranging):
    """What a state rearranges while the model runs. Attributes are those of `EplbState`."""

    is_async: bool
    rearrange_event: threading.Event
    async_worker: Worker | None
    device: torch.device
    _under_way: _UnderWay | None = None

    def start_async_loop(
        self, rank_mapping: Mapping[int, int] | None = None, is_profile: bool = False
    ) -> None:
        """Start the thread that rearranges beside the forward pass; nothing for a state that has none.

        Args:
            rank_mapping: not looked at: ranks come and go while nothing is under way.
            is_profile: take the memory that a rearrangement takes, too. **Collective.**
        """
        del rank_mapping
        if not self.is_async:
            return
        if is_profile:
            self._reserve()
        self._worker().launch()

    def drain_async(self) -> None:
        """Complete what is under way beside the forward pass. **Collective**; nothing where nothing is.

        Raises:
            CollectiveMismatchError: on every rank, when they are at different steps.
            CommError: as `step` does.
        """
        while self._is_busy:
            if not self._step_beside():
                time.sleep(_SECONDS_BETWEEN_LOOKS)

    @property
    def _is_busy(self) -> bool:
        return self.async_worker is not None and self.async_worker.is_busy

    def _refuse_while_busy(self, what: str) -> None:
        if self._is_busy:
            raise UsageError(f"{what} while experts are being rearranged; call drain_async() on every rank")

    def _worker(self) -> Worker:
        """What does it; made when it is first needed, since it takes the name and deadline of the group."""
        if self.async_worker is None:
            group = self.ep_group
            name, timeout = group.unique_name, group.timeout
            self.async_worker = Worker(self._smallest, self.device, name=name, timeout=timeout)
        return self.async_worker

    def _smallest(self, num_ready: int) -> int:
        visits = Meeting(self.ep_group).agree(
            Errand.SWITCH, self.num_steps, len(self.model_states), num_ready=num_ready
        )
        return min(visit.num_ready for visit in visits)

    def _begin_beside(self, loads: Sequence[torch.Tensor]) -> None:
        """Let the thread plan and move for these loads, of each model [L, E]. **Collective.**"""
        planners = []
        for state, load in zip(self.model_states.values(), loads, strict=True):
            before, change = self._consult(Meeting(self.ep_group), state, load, None, self.num_steps)
            assert state.eplb_stats is not None
            if len(before):
                # Made here: groups are made in one order on all ranks, and other threads make others.
                self._mover(state)
            planner = functools.partial(plan_move, before, state.eplb_stats, self.policy_name, change)
            planners.append((state, planner))
        under_way = self._under_way = _UnderWay(time.perf_counter())

        def plan() -> list[LayerSwitch]:
            under_way.moves = [(state, planner()) for state, planner in planners]
            return [
                switch for state, move in under_way.moves for switch in switches_of(state, move, self._mover)
            ]

        self._worker().start(plan)
        self.rearrange_event.set()

    def _step_beside(self) -> bool:
        """Switch a layer that is ready on all ranks. **Collective** while one is under way.

        Returns:
            Whether a layer was switched.
        """
        if not self._is_busy:
            return False
        worker = self.async_worker
        assert worker is not None
        try:
            was_switched = worker.on_step()
        except BaseException:
            if not worker.is_busy:
                self._forget_beside()
                # What was under way is over for all; the next rearrangement begins with other movers.
                for state in self.model_states.values():
                    state.close()
            raise
        if not worker.is_busy:
            under_way = self._forget_beside()
            seconds = time.perf_counter() - under_way.begin
            for state, move in under_way.moves:
                self._report(state, move, seconds)
        return was_switched

    def _forget_beside(self) -> _UnderWay:
        under_way, self._under_way = self._under_way, None
        self.rearrange_event.clear()
        assert under_way is not None
        return under_way


def start_async_worker(
    state: Background, rank_mapping: Mapping[int, int] | None = None, is_profile: bool = False
) -> threading.Thread:
    """`start_async_loop`, as a function that gives the thread.

    Args:
        state: that rearranges beside the forward pass.
        rank_mapping: as for `start_async_loop`.
        is_profile: likewise.

    Raises:
        UsageError: when the state has no such thread.
    """
    if not state.is_async:
        raise UsageError("the state rearranges in step(), without a thread; set use_async=True")
    state.start_async_loop(rank_mapping, is_profile)
    assert state.async_worker is not None
    return state.async_worker.launch()
