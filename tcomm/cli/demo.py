"""`tcomm demo`: every all-reduce on real processes, checked, without a model and without a GPU."""

from __future__ import annotations

import sys
from typing import Any

import torch

import tcomm.reference
from tcomm.algorithms import ALGORITHMS
from tcomm.cli.workers import run_ranks
from tcomm.groups.communicator import Communicator
from tcomm.tuning.measure import Candidate, Schedule, summarise, time_alternating

__all__ = ["run_demo"]

_NUMEL = 5000


def run_demo(ranks: int, timeout: float) -> dict[str, Any]:
    """Run every algorithm on `ranks` processes and compare its bits with the reference.

    Returns:
        `explanation`, `rows` of (algorithm, dtype, microseconds, bits equal), `launches` by kernel, `ok`.
    """
    result: dict[str, Any] = run_ranks(ranks, _demonstrate, timeout=timeout)
    return result


def _demonstrate() -> dict[str, Any]:
    with Communicator(timeout=60.0) as comm:
        rows = [
            _row(comm, algorithm.name, dtype)
            for algorithm in ALGORITHMS["all_reduce"]
            for dtype in (torch.float32, torch.bfloat16)
        ]
        decision = comm.explain("all_reduce", nbytes=_NUMEL * 4)
    counter = sys.modules.get("tcomm.kernels.launch")
    return {
        "explanation": str(decision),
        "rows": rows,
        "launches": dict(counter.launches) if counter else {},
        "ok": all(row["equal"] for row in rows),
    }


def _row(comm: Communicator, algorithm: str, dtype: torch.dtype) -> dict[str, Any]:
    inputs = [_input(rank, dtype) for rank in range(comm.world_size)]
    x, expected = inputs[comm.rank], tcomm.reference.all_reduce(inputs)[comm.rank]
    out = torch.empty_like(x)

    def run() -> None:
        comm.all_reduce(x, out=out, algorithm=algorithm)

    def count_wrong() -> int:
        return int((out != expected).sum())

    candidate = Candidate(run, lambda: out.fill_(float("nan")), count_wrong)
    schedule = Schedule(1, 3, 1) if algorithm.startswith("triton") else Schedule(4, 20, 5)
    seconds, wrong = time_alternating({algorithm: candidate}, schedule, comm.barrier)
    summary = summarise(seconds[algorithm], lambda mine: _gather(comm, mine))
    total = _gather(comm, torch.tensor([wrong[algorithm]])).sum()
    return {
        "algorithm": algorithm,
        "dtype": str(dtype).removeprefix("torch."),
        "median_us": summary.median_us,
        "equal": bool(total == 0),
    }


def _input(rank: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(_NUMEL, generator=torch.Generator().manual_seed(rank)).to(dtype)


def _gather(comm: Communicator, mine: torch.Tensor) -> torch.Tensor:
    return comm.all_gather_single(mine)
