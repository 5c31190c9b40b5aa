"""`tcomm bench call_overhead`: what the group layer adds to a call of the communicator."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from tcomm.groups.communicator import Communicator
from tcomm.groups.device import CpuCommunicator
from tcomm.groups.parallel.communication_op import tensor_model_parallel_all_reduce
from tcomm.groups.parallel.coordinator import GroupCoordinator
from tcomm.groups.parallel.state import ParallelState, use
from tcomm.tuning.measure import Candidate, Schedule, Summary, percentiles, time_alternating

__all__ = ["OVERHEAD_HEADER", "measure_overhead", "overhead_columns", "overhead_rows"]

_CALLS_OF_A_SAMPLE = 100
"""One call is too short for the clock."""
_NAMES = ("Communicator.all_reduce", "tensor_model_parallel_all_reduce", "difference")
OVERHEAD_HEADER = ("call", "median (us)", "p10", "p90")
"""Titles of `overhead_columns`."""


class _Idle:
    """A planner for a transport that does nothing."""

    def plan(self, *_: object) -> Callable[..., None]:
        return _do_nothing


def _do_nothing(*_: object) -> None:
    pass


@contextmanager
def _idle_group() -> Iterator[Communicator]:
    """The communicator of the current TP group. Both believe in a peer, and neither waits for it."""
    device = CpuCommunicator(None, unique_name="tp:overhead")
    device.communicator._planner = _Idle()  # type: ignore[assignment]
    # A real one of two ranks would need two processes, and its transport.
    coordinator = GroupCoordinator.__new__(GroupCoordinator)
    coordinator.world_size, coordinator.unique_name = 2, device.unique_name
    coordinator.device_communicator = device
    state = ParallelState()
    state.groups["tp"] = coordinator
    try:
        with use(state):
            yield device.communicator
    finally:
        device.destroy()


def measure_overhead(schedule: Schedule) -> dict[str, Summary]:
    """Time both calls in alternating blocks, in this process alone.

    Args:
        schedule: blocks, and samples of a hundred calls in each.

    Returns:
        Microseconds of a bare call, of one through the group layer, and of what the second takes longer in
        each block.
    """
    x = torch.ones(4, device="cpu")
    with _idle_group() as communicator:
        calls: dict[str, Callable[[torch.Tensor], Any]] = {
            _NAMES[0]: communicator.all_reduce,
            _NAMES[1]: tensor_model_parallel_all_reduce,
        }
        candidates = {
            name: Candidate(functools.partial(_repeat, call, x), _do_nothing, lambda: 0)
            for name, call in calls.items()
        }
        seconds, _ = time_alternating(candidates, schedule, _do_nothing)
    microseconds = {name: values * 1e6 / _CALLS_OF_A_SAMPLE for name, values in seconds.items()}
    blocks = [np.median(values.reshape(schedule.blocks, -1), axis=1) for values in microseconds.values()]
    microseconds[_NAMES[2]] = blocks[1] - blocks[0]
    return {name: percentiles(values) for name, values in microseconds.items()}


def _repeat(call: Callable[[torch.Tensor], Any], x: torch.Tensor) -> None:
    for _ in range(_CALLS_OF_A_SAMPLE):
        call(x)


def overhead_rows(found: dict[str, Summary]) -> list[dict[str, Any]]:
    """What is written as JSON."""
    return [{"call": name, **dataclasses.asdict(summary)} for name, summary in found.items()]


def overhead_columns(found: dict[str, Summary]) -> list[list[str]]:
    """Rows of a table."""
    return [[name, f"{s.median_us:.2f}", f"{s.p10_us:.2f}", f"{s.p90_us:.2f}"] for name, s in found.items()]
