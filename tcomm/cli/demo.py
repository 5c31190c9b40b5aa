"""`tcomm demo`: every collective on real processes, checked, without a model and without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tcomm import reference
from tcomm.algorithms import ALGORITHMS, FAMILIES
from tcomm.cli.workers import run_ranks
from tcomm.groups.communicator import Communicator
from tcomm.tuning.measure import Candidate, Schedule, summarise, time_alternating

__all__ = ["run_demo"]

_NUMEL_PER_RANK = 1250
_ROOT = 0
_VERBS: dict[
    str, tuple[tuple[object, ...], Callable[[list[torch.Tensor]], Sequence[torch.Tensor | None]]]
] = {
    "all_reduce": ((), reference.all_reduce),
    "reduce": ((_ROOT,), lambda inputs: reference.reduce(inputs, _ROOT)),
    "reduce_scatter_single": ((), reference.reduce_scatter),
    "all_gather_single": ((), reference.all_gather),
    "gather": ((_ROOT,), lambda inputs: reference.gather(inputs, _ROOT)),
    "broadcast": ((_ROOT,), lambda inputs: reference.broadcast(inputs, _ROOT)),
    "scatter": ((_ROOT,), lambda inputs: reference.scatter(inputs, _ROOT)),
    "all_to_all_single": ((), reference.all_to_all),
}
"""Arguments besides the tensor, and meaning."""


def run_demo(ranks: int, timeout: float) -> dict[str, Any]:
    """Run every algorithm on `ranks` processes and compare its bits with the reference.

    Returns:
        `explanation`, `rows` of (verb, algorithm, dtype, microseconds, bits equal), `launches` by kernel,
        `ok`.
    """
    result: dict[str, Any] = run_ranks(ranks, _demonstrate, timeout=timeout)
    return result


def _demonstrate() -> dict[str, Any]:
    with Communicator(timeout=60.0) as comm:
        rows = [
            _row(comm, verb, algorithm.name, dtype)
            for verb in _VERBS
            for algorithm in ALGORITHMS[FAMILIES[verb]]
            for dtype in (torch.float32, torch.bfloat16)
        ]
        decision = comm.explain("all_reduce", nbytes=_NUMEL_PER_RANK * comm.world_size * 4)
    counter = sys.modules.get("tcomm.kernels.launch")
    return {
        "explanation": str(decision),
        "rows": rows,
        "launches": dict(counter.launches) if counter else {},
        "ok": all(row["equal"] for row in rows),
    }


def _row(comm: Communicator, verb: str, algorithm: str, dtype: torch.dtype) -> dict[str, Any]:
    args, meaning = _VERBS[verb]
    inputs = [_input(rank, comm.world_size, dtype) for rank in range(comm.world_size)]
    x, expected = inputs[comm.rank], meaning(inputs)[comm.rank]
    out = None if expected is None else torch.empty_like(expected)

    def forget() -> None:
        if out is not None:
            out.fill_(float("nan"))

    def run() -> None:
        getattr(comm, verb)(x, *args, out=out, algorithm=algorithm)

    def count_wrong() -> int:
        return 0 if out is None or expected is None else int((out != expected).sum())

    candidate = Candidate(run, forget, count_wrong)
    schedule = Schedule(1, 2, 1) if algorithm.startswith("triton") else Schedule(4, 20, 5)
    seconds, wrong = time_alternating({algorithm: candidate}, schedule, comm.barrier)
    summary = summarise(seconds[algorithm], comm.all_gather_single)
    total = comm.all_gather_single(torch.tensor([wrong[algorithm]], device="cpu")).sum()
    return {
        "verb": verb,
        "algorithm": algorithm,
        "dtype": str(dtype).removeprefix("torch."),
        "median_us": summary.median_us,
        "equal": bool(total == 0),
    }


def _input(rank: int, world_size: int, dtype: torch.dtype) -> torch.Tensor:
    numel = _NUMEL_PER_RANK * world_size
    return torch.randn(numel, device="cpu", generator=torch.Generator().manual_seed(rank)).to(dtype)
