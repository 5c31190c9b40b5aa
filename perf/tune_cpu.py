"""Measure every algorithm of every collective on this machine's CPUs and write the table of the winners.

    python perf/tune_cpu.py --out tcomm/tuning/tables/cpu.json
    python perf/tune_cpu.py --out tcomm/tuning/tables/cpu_symmetric.json --families all_reduce_symmetric

All candidates of a size are timed in one run, in alternating blocks, checked, the slowest rank counted.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import pathlib
import platform
import sys
from typing import Annotated

import msgspec
import torch
import typer

from tcomm.algorithms import ALGORITHMS, DIRECT_ALGORITHMS
from tcomm.cli.bench import parse_sizes
from tcomm.cli.cases import ROOT, VERBS, Case
from tcomm.cli.workers import run_ranks
from tcomm.groups.communicator import Communicator
from tcomm.groups.jobs import JOBS, Caller
from tcomm.tuning.choose import IN_SYMMETRIC
from tcomm.tuning.measure import Schedule, summarise, time_alternating
from tcomm.tuning.table import Row, Table

ARGUMENTS = {
    "all_reduce": ("sum",),
    "reduce": (ROOT, "sum"),
    "reduce_scatter": ("sum", 0),
    "all_gather": (0,),
    "gather": (ROOT, 0),
    "broadcast": (ROOT,),
    "scatter": (ROOT, 0),
    "all_to_all": (),
    "all_reduce_symmetric": ("sum",),
}
PIECES = tuple(kib * 1024 for kib in (0, 64, 256, 512, 1024, 2048))
WORTH = 0.95
"""Of another's time: what gains less is no reason to do otherwise than for the size before, or in pieces."""
LONG = 1 << 20
"""Bytes from which fewer calls do: nobody waits a minute for a size."""


def measure(family: str, sizes: list[int], engine: str, schedule: Schedule) -> dict[str, dict[str, float]]:
    """On every rank: {size: {"algorithm@piece": median microseconds}}."""
    with Communicator(timeout=120.0) as comm:
        return {str(nbytes): measure_size(comm, family, nbytes, engine, schedule) for nbytes in sizes}


def measure_size(comm, family, nbytes, engine, schedule):
    family, is_symmetric = family.removesuffix(IN_SYMMETRIC), family.endswith(IN_SYMMETRIC)
    case = Case(family, comm.rank, comm.world_size, nbytes // 4, torch.float32, "sum", True)
    if is_symmetric:
        case.out = comm.symmetric_empty(case.out.shape)
    candidates = {name: case.candidate(run) for name, run in runs(comm, family, case, engine, nbytes)}
    if nbytes > LONG:
        schedule = dataclasses.replace(schedule, calls=max(2, schedule.calls * LONG // nbytes), warmups=1)
    settle = comm.barrier if len(os.sched_getaffinity(0)) < comm.world_size else None
    seconds, wrong = time_alternating(candidates, schedule, comm.barrier, settle)
    assert not any(wrong.values()), wrong
    return {name: summarise(values, comm.all_gather_single).median_us for name, values in seconds.items()}


def runs(comm, family, case, engine, nbytes):
    """Every algorithm of an engine, in whole messages and in pieces; for the CPU torch.distributed, too."""
    for algorithm in ALGORITHMS[family]:
        if algorithm.engine == engine:
            for piece in PIECES if engine == "cpu" else (0,):
                if piece < nbytes:
                    yield f"{algorithm.name}@{piece}", call(comm, family, case, algorithm.name, piece)
    if not comm._regions.is_empty and engine == "cpu":
        for algorithm in DIRECT_ALGORITHMS[family]:
            yield f"{algorithm.name}@0", call(comm, family, case, algorithm.name, 0)
    if engine == "cpu":
        yield "torch:gloo@0", call(comm, family, case, "torch", 0)


def call(comm, family, case, algorithm, piece):
    verb = VERBS[family]
    job = JOBS[verb](Caller(comm.rank, comm.world_size, case.x.shape, case.x.dtype), *ARGUMENTS[family])
    reason = comm.explain(verb, nbytes=job.nbytes, algorithm=algorithm, symmetric=not comm._regions.is_empty)
    if reason.is_direct:
        contents = comm._regions.name(case.out)
        job = dataclasses.replace(job, call=msgspec.structs.replace(job.call, contents=contents))
    decision = dataclasses.replace(reason, piece_nbytes=piece)
    plan = comm._planner.plan(job, decision, 120.0, comm._pool)
    out = case.x if family == "broadcast" or not case.has_result else case.out

    def run():
        plan(case.x, out, 120.0)
        return out if case.has_result else None

    return run


def choose(times, before):
    """The fastest `algorithm@piece`, unless that of the size before, or no pieces, is nearly as fast."""
    ours = {name: us for name, us in times.items() if not name.startswith("torch")}
    fastest = min(ours, key=ours.get)
    simpler = (before, fastest.split("@")[0] + "@0")
    return next((name for name in simpler if name in ours and ours[name] * WORTH <= ours[fastest]), fastest)


def rows_of(family, measured, ranks, min_ranks, max_ranks):
    """One row per run of sizes with the same choice."""
    rows, chosen = [], ""
    for size, times in sorted(measured.items(), key=lambda item: int(item[0])):
        chosen = choose(times, chosen)
        algorithm, piece = chosen.split("@")
        best = {}
        for name, us in times.items():
            plain = name.split("@")[0]
            best[plain] = min(round(us, 1), best.get(plain, float("inf")))
        best[algorithm] = round(times[chosen], 1)
        row = Row(
            op=family, algorithm=algorithm, max_nbytes=int(size), min_ranks=min_ranks,
            max_ranks=max_ranks, piece_nbytes=int(piece), measured_us=best,
            measured_at=f"{ranks} ranks, {size} bytes",
        )  # fmt: skip
        if rows and (rows[-1].algorithm, rows[-1].piece_nbytes) == (row.algorithm, row.piece_nbytes):
            rows[-1] = row
        else:
            rows.append(row)
    rows[-1] = msgspec.structs.replace(rows[-1], max_nbytes=None)
    return rows


def main(
    out: Annotated[pathlib.Path, typer.Option(help="file to write")],
    families: Annotated[str, typer.Option(help="collectives to measure")] = ",".join(
        family for family in ARGUMENTS if not family.endswith(IN_SYMMETRIC)
    ),
    sizes: Annotated[str, typer.Option(help="bytes, as nccl-tests counts them")] = (
        "1KiB,16KiB,64KiB,256KiB,1MiB,4MiB,32MiB"
    ),
    triton_sizes: Annotated[str, typer.Option(help="bytes, for interpreted kernels")] = "1KiB,64KiB",
    blocks: Annotated[int, typer.Option(help="blocks of each candidate")] = 4,
    calls: Annotated[int, typer.Option(help="timed calls of a block, up to 1 MiB")] = 20,
) -> None:
    """Measure and write the tuning table."""
    rows = []
    for ranks, low, high in ((2, 2, 2), (4, 3, 16)):
        for family in families.split(","):
            for engine, lengths, schedule in (
                ("cpu", sizes, Schedule(blocks, calls, 3)),
                ("triton", triton_sizes, Schedule(2, 2, 1)),
            ):
                if engine == "triton" and family.endswith(IN_SYMMETRIC):
                    continue
                args = (family, parse_sizes(lengths), engine, schedule)
                measured = run_ranks(ranks, measure, *args, timeout=1800.0)
                rows += rows_of(family, measured, ranks, low, high)
                print(ranks, family, engine, measured, flush=True)
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, no pinning"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    command = "python " + " ".join(sys.argv)
    table = Table(format=1, machine=machine, versions=versions, date=date, command=command, rows=tuple(rows))
    out.write_bytes(msgspec.json.format(table.encode(), indent=1) + b"\n")


if __name__ == "__main__":
    typer.run(main)
