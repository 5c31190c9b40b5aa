"""`tcomm bench`: a collective against torch.distributed's, in nccl-tests' columns."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from tcomm.algorithms import REDUCE_OPS
from tcomm.cli.workers import run_ranks
from tcomm.errors import ConfigError
from tcomm.groups.communicator import Communicator
from tcomm.tuning.measure import Candidate, Schedule, bus_factor, summarise, time_alternating

__all__ = ["BenchRequest", "parse_sizes", "run_bench"]

_UNITS = {
    "": 1,
    "B": 1,
    "KIB": 1 << 10,
    "K": 1 << 10,
    "MIB": 1 << 20,
    "M": 1 << 20,
    "GIB": 1 << 30,
    "G": 1 << 30,
}
_CHECKED_WHOLE_BYTES = 64 * 1024
_WHOLE_CHECK_PERIOD = 8
_SAMPLE = 1024


@dataclasses.dataclass(frozen=True)
class BenchRequest:
    """What to measure."""

    op: str
    """The verb."""
    ranks: int
    """Processes on this machine."""
    sizes: tuple[int, ...]
    """Bytes of one rank's input."""
    dtype: str = "float32"
    """Element type as torch spells it."""
    reduce: str = "sum"
    """Reduce operation."""
    algorithm: str = ""
    """Engine, algorithm or both; empty: the table's choice."""
    outs: tuple[str, ...] = ("reused", "allocated")
    """Whether the result goes to memory that was used before, or is new each time."""
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    """How often."""
    pin: bool = False
    """Give each rank one core."""


def parse_sizes(text: str) -> tuple[int, ...]:
    """Bytes of `1KiB,16KiB,1M,100`.

    Raises:
        ConfigError: when a size makes no sense.
    """
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*([A-Za-z]*)\s*", part)
        if match is None or match[2].upper() not in _UNITS:
            raise ConfigError(f"{part!r} is not a size; give bytes, or a number with KiB, MiB or GiB")
        sizes.append(int(match[1]) * _UNITS[match[2].upper()])
    return tuple(sizes)


def run_bench(request: BenchRequest, timeout: float) -> list[dict[str, Any]]:
    """Measure, in processes of its own, and return a row per size and kind of result.

    Raises:
        ConfigError: when the request makes no sense.
        CommError: when a rank failed or the deadline passed.
    """
    if request.op != "all_reduce":
        raise ConfigError(f"{request.op!r} cannot be measured yet; give all_reduce")
    if request.reduce not in REDUCE_OPS:
        raise ConfigError(f"{request.reduce!r} cannot be measured; give one of {', '.join(REDUCE_OPS)}")
    if not isinstance(getattr(torch, request.dtype, None), torch.dtype):
        raise ConfigError(f"{request.dtype!r} is no dtype of torch")
    itemsize = getattr(torch, request.dtype).itemsize
    odd = [size for size in request.sizes if size % itemsize]
    if odd:
        raise ConfigError(f"sizes {odd} are not multiples of {itemsize} bytes, the size of a {request.dtype}")
    rows: list[dict[str, Any]] = run_ranks(
        request.ranks, _measure_all, request, timeout=timeout, pin=request.pin
    )
    return rows


def _measure_all(request: BenchRequest) -> list[dict[str, Any]]:
    with Communicator(timeout=60.0) as comm:
        return [_measure(comm, request, size, out) for size in request.sizes for out in request.outs]


def _measure(comm: Communicator, request: BenchRequest, nbytes: int, out: str) -> dict[str, Any]:
    dtype = getattr(torch, request.dtype)
    case = _Case(comm, request, nbytes // dtype.itemsize, dtype, out)
    cores = {core for rank in _gather_cores() for core in rank}
    settle = comm.barrier if len(cores) < comm.world_size else None
    seconds, wrong = time_alternating(
        {"tcomm": case.tcomm(), "gloo": case.gloo()}, request.schedule, comm.barrier, settle
    )
    ours, baseline = (summarise(seconds[name], _gather) for name in ("tcomm", "gloo"))
    decision = comm.explain(
        "all_reduce", nbytes=nbytes, dtype=dtype, op=request.reduce, algorithm=request.algorithm
    )
    return {
        "op": request.op,
        "algorithm": decision.algorithm,
        "ranks": comm.world_size,
        "dtype": request.dtype,
        "redop": request.reduce,
        "nbytes": nbytes,
        "out": out,
        "median_us": ours.median_us,
        "p10_us": ours.p10_us,
        "p90_us": ours.p90_us,
        "busbw_gbps": _bandwidth(request.op, nbytes, ours.median_us, comm.world_size),
        "baseline": "gloo",
        "baseline_us": baseline.median_us,
        "baseline_p10_us": baseline.p10_us,
        "baseline_p90_us": baseline.p90_us,
        "ratio": baseline.median_us / ours.median_us,
        "wrong": int(_gather(torch.tensor([wrong["tcomm"]])).sum()),
        "checked": bool(_gather(torch.tensor([sum(wrong.values())])).sum() == 0),
        "affinity": "one core a rank" if request.pin else f"{len(cores)} cores for {comm.world_size} ranks",
        "calls": len(seconds["tcomm"]),
    }


def _gather(mine: torch.Tensor) -> torch.Tensor:
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    return torch.cat(rows)


def _gather_cores() -> list[list[int]]:
    """The cores that each rank may run on."""
    mine = torch.zeros(1024, dtype=torch.int64)
    mine[sorted(os.sched_getaffinity(0))] = 1
    return [torch.nonzero(row).view(-1).tolist() for row in _gather(mine).view(-1, len(mine))]


def _bandwidth(op: str, nbytes: int, median_us: float, world_size: int) -> float:
    return nbytes / median_us / 1e3 * bus_factor(op, world_size)


class _Case:
    """One size: fresh input before each call, the result compared after it."""

    def __init__(
        self, comm: Communicator, request: BenchRequest, numel: int, dtype: torch.dtype, out: str
    ) -> None:
        self._comm = comm
        self._request = request
        self._reuses = out == "reused"
        # Small integers: every sum is exact, in any order and any of the types.
        self._pattern = torch.arange(numel) % 7
        self._x = torch.empty(numel, dtype=dtype)
        self._out = torch.zeros(numel, dtype=dtype)
        self._result = self._out
        self._calls = 0
        self._is_long = numel * dtype.itemsize > _CHECKED_WHOLE_BYTES

    def _reduced(self, base: torch.Tensor) -> torch.Tensor:
        ranks = range(self._comm.world_size)
        reduce = self._request.reduce
        if reduce in {"max", "min"}:
            return base + (max(ranks) if reduce == "max" else 0)
        total = base * len(ranks) + sum(ranks)
        return total / len(ranks) if reduce == "avg" else total

    @property
    def _base(self) -> torch.Tensor:
        """What rank 0 gives at this call, and others with their rank added: a pattern, or one number.

        Reading a pattern before each call, and an expectation after it, would leave the caches of a long
        message to the benchmark; a program has just written what it reduces.
        """
        turn = self._calls % 5
        if self._is_long and self._calls % _WHOLE_CHECK_PERIOD:
            return torch.tensor(turn)
        return self._pattern + turn

    def _prepare(self) -> None:
        self._calls += 1
        self._x.copy_(self._base + self._comm.rank)

    def _count_wrong(self) -> int:
        expected = self._reduced(self._base).to(self._x.dtype)
        given = self._result if expected.dim() else _sampled(self._result)
        return int((given != expected).sum())

    def tcomm(self) -> Candidate:
        """The communicator's collective."""
        comm, request = self._comm, self._request

        def run() -> None:
            out = self._out if self._reuses else None
            self._result = comm.all_reduce(self._x, request.reduce, out=out, algorithm=request.algorithm)

        return Candidate(run, self._prepare, self._count_wrong)

    def gloo(self) -> Candidate:
        """torch.distributed's: in place, or in place on a copy."""
        ops = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
        op = ops.get(self._request.reduce, dist.ReduceOp.SUM)
        scale = 1.0 / self._comm.world_size if self._request.reduce == "avg" else None

        def run() -> None:
            self._result = self._x if self._reuses else self._x.clone()
            dist.all_reduce(self._result, op)
            if scale is not None:
                self._result.mul_(scale)

        def prepare() -> None:
            self._prepare()
            # gloo's threads sleep between calls; without this its times would be two or three times worse.
            dist.barrier()

        return Candidate(run, prepare, self._count_wrong)


def _sampled(x: torch.Tensor) -> torch.Tensor:
    """Both ends and some thousand elements in between."""
    stride = max(1, x.numel() // _SAMPLE)
    return torch.cat([x[:_SAMPLE], x[::stride], x[-_SAMPLE:]])


def columns(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows as nccl-tests prints them, with the baseline and the ratio behind."""
    return [
        [
            str(row["nbytes"]),
            str(row["nbytes"] // getattr(torch, row["dtype"]).itemsize),
            row["dtype"],
            row["redop"],
            "-1",
            f"{row['median_us']:.1f}",
            f"{row['p10_us']:.1f}",
            f"{row['p90_us']:.1f}",
            f"{row['nbytes'] / row['median_us'] / 1e3:.2f}",
            f"{row['busbw_gbps']:.2f}",
            str(row["wrong"]),
            f"{row['baseline_us']:.1f}",
            f"{row['ratio']:.1f}",
            row["out"],
            row["algorithm"],
        ]
        for row in rows
    ]


HEADER = (
    "size (B)", "count", "type", "redop", "root", "time (us)", "p10", "p90",
    "algbw (GB/s)", "busbw (GB/s)", "#wrong", "gloo (us)", "ratio", "out", "algorithm",
)  # fmt: skip
"""Titles of `columns`."""
