"""`tcomm bench`: a collective against torch.distributed's and MPI's, in nccl-tests' columns."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from tcomm.algorithms import DIRECT_ALGORITHMS, REDUCE_OPS
from tcomm.cli.cases import REDUCING, ROOT, ROOTED, VERBS, Case, check_size
from tcomm.cli.contenders import BASELINES, Gloo, Tcomm, refuse_unknown_to_mpi
from tcomm.cli.workers import run_ranks
from tcomm.errors import ConfigError
from tcomm.groups.communicator import Communicator
from tcomm.tuning.measure import Candidate, Schedule, bus_factor, percentiles, slowest, time_alternating

__all__ = [
    "INTO_SYMMETRIC",
    "BenchRequest",
    "Measurement",
    "check_request",
    "measure",
    "parse_outs",
    "parse_sizes",
    "rows_of",
    "run_bench",
]

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


INTO_SYMMETRIC = tuple(DIRECT_ALGORITHMS)
"""Verbs that write straight to a symmetric tensor."""
_SYMMETRIC = ("symmetric", "in_place")
"""Kinds of result in symmetric tensors."""


@dataclasses.dataclass(frozen=True)
class BenchRequest:
    """What to measure."""

    op: str
    """The verb, by nccl-tests' name."""
    ranks: int
    """Processes on this machine."""
    sizes: tuple[int, ...]
    """Bytes of the message as nccl-tests counts it; a barrier has none."""
    dtype: str = "float32"
    """Element type as torch spells it."""
    reduce: str = "sum"
    """Reduce operation."""
    algorithm: str = ""
    """Engine, algorithm or both; empty: the table's choice."""
    outs: tuple[str, ...] = ("reused", "allocated")
    """Whether the result goes to memory that was used before, is new each time, a symmetric tensor, or
    one that is the input, too."""
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    """How often."""
    pin: bool = False
    """Give each rank one core."""
    against: tuple[str, ...] = ("gloo",)
    """Baselines in the same run."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One verb at one size, by everybody in the same run."""

    op: str
    """The verb."""
    algorithm: str
    """What tcomm used; `-` where there is nothing to choose."""
    ranks: int
    """How many."""
    dtype: str
    """Element type."""
    redop: str
    """Reduce operation; `none` where nothing is reduced."""
    nbytes: int
    """Of the message."""
    out: str
    """`reused`, `allocated`, `symmetric`, `in_place`, or `none` where nothing comes out."""
    affinity: str
    """What the ranks could run on."""
    microseconds: dict[str, list[float]]
    """Of each timed call in order, the slowest rank's, by contender."""
    wrong: dict[str, int]
    """Wrong elements over all calls and ranks, by contender."""


def parse_sizes(text: str) -> tuple[int, ...]:
    """Bytes of `1KiB,16KiB,1M,100`; `1KiB..1MiB` doubles from the first while it is at most the last.

    Raises:
        ConfigError: when a size makes no sense.
    """
    sizes: list[int] = []
    for part in text.split(","):
        first, dots, last = part.partition("..")
        low, high = _parse_size(first), _parse_size(last if dots else first)
        if dots and not 0 < low <= high:
            raise ConfigError(f"{part!r} is not a range of sizes; give a positive one and a larger one")
        while low <= high:
            sizes.append(low)
            low = 2 * low if dots else high + 1
    return tuple(sizes)


def _parse_size(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f"{text!r} is not a size; give bytes, or a number with KiB, MiB or GiB")
    return int(match[1]) * _UNITS[match[2].upper()]


def parse_outs(op: str, text: str) -> tuple[str, ...]:
    """The kinds of result that `--out` asks for.

    Raises:
        ConfigError: when it names none.
    """
    kinds = ("reused", "allocated", *(_SYMMETRIC if op in INTO_SYMMETRIC else ()))
    known = {kind: (kind,) for kind in ("reused", "allocated", *_SYMMETRIC)}
    known |= {"both": kinds[:2], "all": kinds}
    if text not in known:
        raise ConfigError(f"--out {text!r} is none of {', '.join(known)}")
    return known[text]


def check_request(request: BenchRequest) -> BenchRequest:
    """The request as it can be carried out.

    Raises:
        ConfigError: when it makes no sense.
    """
    if request.op not in VERBS:
        raise ConfigError(f"{request.op!r} cannot be measured; give one of {', '.join(VERBS)}")
    if request.reduce not in REDUCE_OPS:
        raise ConfigError(f"{request.reduce!r} cannot be measured; give one of {', '.join(REDUCE_OPS)}")
    unknown = [name for name in request.against if name not in BASELINES]
    if unknown or not request.against:
        raise ConfigError(f"{', '.join(unknown)!r} is not a baseline; give {' or '.join(BASELINES)}")
    dtype = getattr(torch, request.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"{request.dtype!r} is no dtype of torch")
    if "mpi" in request.against and request.op in REDUCING:
        refuse_unknown_to_mpi(dtype)
    if request.algorithm and request.op in {"barrier", "sendrecv"}:
        raise ConfigError(f"{request.op} has no algorithms to choose from")
    if {*_SYMMETRIC} & {*request.outs} and request.op not in INTO_SYMMETRIC:
        raise ConfigError(f"only {', '.join(INTO_SYMMETRIC)} writes straight to symmetric tensors")
    if request.op == "barrier":
        return dataclasses.replace(request, sizes=(0,), outs=("none",))
    for size in request.sizes:
        check_size(request.op, size, dtype, request.ranks)
    return request


def run_bench(request: BenchRequest, timeout: float) -> list[dict[str, Any]]:
    """Measure, in processes of its own, and return a row per size, kind of result and baseline.

    Raises:
        ConfigError: when the request makes no sense.
        CommError: when a rank failed or the deadline passed.
    """
    request = check_request(request)
    rows: list[dict[str, Any]] = run_ranks(
        request.ranks, _measure_all, request, timeout=timeout, pin=request.pin, mpi="mpi" in request.against
    )
    return rows


def _measure_all(request: BenchRequest) -> list[dict[str, Any]]:
    with Communicator(timeout=60.0) as comm:
        return [
            row
            for size in request.sizes
            for out in request.outs
            for row in rows_of(measure(comm, request, size, out))
        ]


def measure(comm: Communicator, request: BenchRequest, nbytes: int, out: str) -> Measurement:
    """Time tcomm and the baselines in alternating blocks. **Collective.**"""
    dtype: torch.dtype = getattr(torch, request.dtype)
    numel = nbytes // dtype.itemsize
    case = Case(request.op, comm.rank, comm.world_size, numel, dtype, request.reduce, out != "allocated")
    ours = case
    if out in _SYMMETRIC:
        # The baselines keep to ordinary tensors.
        ours = Case(request.op, comm.rank, comm.world_size, numel, dtype, request.reduce, True)
        ours.out = comm.symmetric_empty(case.out.shape, dtype)
        ours.x = ours.out if out == "in_place" else ours.x
    cores = {core for rank in _gather_cores() for core in rank}
    settle = comm.barrier if len(cores) < comm.world_size else None
    seconds, wrong = time_alternating(
        _candidates(case, ours, comm, request), request.schedule, comm.barrier, settle
    )
    pinned = "one core a rank" if len(cores) >= comm.world_size else f"pinned, {len(cores)} cores"
    return Measurement(
        op=request.op,
        algorithm=_algorithm(comm, request, nbytes, out),
        ranks=comm.world_size,
        dtype=request.dtype,
        redop=request.reduce if request.op in REDUCING else "none",
        nbytes=nbytes,
        out=out,
        affinity=pinned if request.pin else f"{len(cores)} cores for {comm.world_size} ranks",
        microseconds={name: slowest(values, _gather).tolist() for name, values in seconds.items()},
        wrong={
            name: int(_gather(torch.tensor([count], device="cpu")).sum()) for name, count in wrong.items()
        },
    )


def _candidates(case: Case, ours: Case, comm: Communicator, request: BenchRequest) -> dict[str, Candidate]:
    op = request.op
    candidates = {"tcomm": ours.candidate(Tcomm(ours, comm, request.algorithm).call_of(op))}
    for name in request.against:
        calls = BASELINES[name](case)
        # gloo's threads sleep between calls; without this its times would be two or three times worse.
        before = dist.barrier if isinstance(calls, Gloo) else None
        candidates[name] = case.candidate(calls.call_of(op), before)
    return candidates


def _algorithm(comm: Communicator, request: BenchRequest, nbytes: int, out: str) -> str:
    dtype, op = getattr(torch, request.dtype), request.reduce if request.op in REDUCING else "sum"
    try:
        decision = comm.explain(
            VERBS[request.op],
            nbytes=nbytes,
            dtype=dtype,
            op=op,
            algorithm=request.algorithm,
            symmetric=out in _SYMMETRIC,
        )
    except ConfigError:
        # The calls have all been made: this verb does not choose.
        return "-"
    return decision.algorithm


def _gather(mine: torch.Tensor) -> torch.Tensor:
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    return torch.cat(rows)


def _gather_cores() -> list[list[int]]:
    """The cores that each rank may run on."""
    mine = torch.zeros(1024, dtype=torch.int64, device="cpu")
    mine[sorted(os.sched_getaffinity(0))] = 1
    return [torch.nonzero(row).view(-1).tolist() for row in _gather(mine).view(-1, len(mine))]


def rows_of(measured: Measurement) -> list[dict[str, Any]]:
    """A row for each baseline."""
    ours = percentiles(measured.microseconds["tcomm"])
    rows = []
    for name, wrong in measured.wrong.items():
        if name == "tcomm":
            continue
        baseline = percentiles(measured.microseconds[name])
        rows.append(
            {
                "op": measured.op,
                "algorithm": measured.algorithm,
                "ranks": measured.ranks,
                "dtype": measured.dtype,
                "redop": measured.redop,
                "nbytes": measured.nbytes,
                "out": measured.out,
                "median_us": ours.median_us,
                "p10_us": ours.p10_us,
                "p90_us": ours.p90_us,
                "busbw_gbps": measured.nbytes
                / ours.median_us
                / 1e3
                * bus_factor(measured.op, measured.ranks),
                "baseline": name,
                "baseline_us": baseline.median_us,
                "baseline_p10_us": baseline.p10_us,
                "baseline_p90_us": baseline.p90_us,
                "ratio": baseline.median_us / ours.median_us,
                "wrong": measured.wrong["tcomm"],
                "checked": measured.wrong["tcomm"] + wrong == 0,
                "affinity": measured.affinity,
                "calls": len(measured.microseconds["tcomm"]),
            }
        )
    return rows


def columns(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows as nccl-tests prints them, with the baseline and the ratio behind."""
    return [
        [
            str(row["nbytes"]),
            str(row["nbytes"] // getattr(torch, row["dtype"]).itemsize),
            row["dtype"],
            row["redop"],
            str(ROOT if row["op"] in ROOTED else -1),
            f"{row['median_us']:.1f}",
            f"{row['p10_us']:.1f}",
            f"{row['p90_us']:.1f}",
            f"{row['nbytes'] / row['median_us'] / 1e3:.2f}",
            f"{row['busbw_gbps']:.2f}",
            str(row["wrong"]),
            row["baseline"],
            f"{row['baseline_us']:.1f}",
            f"{row['ratio']:.3g}",
            row["out"],
            row["algorithm"],
        ]
        for row in rows
    ]


HEADER = (
    "size (B)", "count", "type", "redop", "root", "time (us)", "p10", "p90",
    "algbw (GB/s)", "busbw (GB/s)", "#wrong", "baseline", "its (us)", "ratio", "out", "algorithm",
)  # fmt: skip
"""Titles of `columns`."""
