"""The one timer: candidates in alternating blocks, checked as they are timed, the slowest rank counted.

How two things are interleaved decides their ratio: call by call, one candidate's helper threads sit on the
cores during the other's calls. So they take turns in blocks, each with untimed calls in front.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

__all__ = [
    "Candidate",
    "Schedule",
    "Summary",
    "bus_factor",
    "host_seconds",
    "percentiles",
    "slowest",
    "summarise",
    "time_alternating",
]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Something to time against something else."""

    run: Callable[[], object]
    """One call; the only part that is timed."""
    prepare: Callable[[], object]
    """Before each call, untimed: fresh input."""
    count_wrong: Callable[[], int]
    """After each call, untimed: wrong elements of the result."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How often what is timed. The same on every rank."""

    blocks: int = 8
    """Blocks of each candidate."""
    calls: int = 30
    """Timed calls of a block."""
    warmups: int = 5
    """Untimed calls before them."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """Microseconds of one candidate, over all blocks and calls, the slowest rank of each call."""

    median_us: float
    """Middle of all calls."""
    p10_us: float
    """Tenth percentile."""
    p90_us: float
    """Ninetieth percentile."""


def host_seconds(run: Callable[[], object]) -> float:
    """How long a call takes until it returns."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def time_alternating(
    candidates: Mapping[str, Candidate],
    schedule: Schedule,
    barrier: Callable[[], object],
    settle: Callable[[], object] | None = None,
    timer: Callable[[Callable[[], object]], float] = host_seconds,
) -> tuple[dict[str, npt.NDArray[np.float64]], dict[str, int]]:
    """Time each candidate in turn, block by block. **Collective**, through `barrier` and the candidates.

    Args:
        candidates: by name, in the same order on every rank.
        schedule: how often.
        barrier: before each call.
        settle: after each call; a barrier where ranks share cores, or one's checks would run in the time
            of another.
        timer: makes a call and says how many seconds it took, of the host or of a GPU.

    Returns:
        Seconds of every timed call on this rank, and wrong elements over all calls, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    wrong = dict.fromkeys(candidates, 0)
    for _ in range(schedule.blocks):
        for name, candidate in candidates.items():
            for index in range(schedule.warmups + schedule.calls):
                candidate.prepare()
                barrier()
                elapsed = timer(candidate.run)
                if settle is not None:
                    settle()
                wrong[name] += candidate.count_wrong()
                if index >= schedule.warmups:
                    seconds[name].append(elapsed)
    return {name: np.array(values) for name, values in seconds.items()}, wrong


def slowest(
    seconds: npt.NDArray[np.float64], gather: Callable[[torch.Tensor], torch.Tensor]
) -> npt.NDArray[np.float64]:
    """Microseconds of the slowest rank of each call. **Collective.**

    Args:
        seconds: of every call on this rank.
        gather: every rank's tensor, one after another.
    """
    mine = torch.from_numpy(seconds)
    worst: npt.NDArray[np.float64] = gather(mine).view(-1, len(seconds)).amax(0).numpy() * 1e6
    return worst


def percentiles(microseconds: Sequence[float] | npt.NDArray[np.float64]) -> Summary:
    """What is reported of all calls."""
    p10, median, p90 = np.percentile(microseconds, [10, 50, 90])
    return Summary(float(median), float(p10), float(p90))


def summarise(seconds: npt.NDArray[np.float64], gather: Callable[[torch.Tensor], torch.Tensor]) -> Summary:
    """Percentiles of the slowest rank of each call. **Collective**; arguments as of `slowest`."""
    return percentiles(slowest(seconds, gather))


def bus_factor(op: str, world_size: int) -> float:
    """nccl-tests' factor from algorithm bandwidth to bus bandwidth; a v form has that of its even one."""
    share = (world_size - 1) / world_size
    factors = {
        "all_reduce": 2 * share,
        "all_gather": share,
        "reduce_scatter": share,
        "all_to_all": share,
        "gather": share,
        "scatter": share,
    }
    return factors.get(op.removesuffix("v"), 1.0)
