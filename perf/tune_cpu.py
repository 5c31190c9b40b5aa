"""Measure every all-reduce algorithm on this machine's CPUs and write the tuning table of the winners.

    python perf/tune_cpu.py --out tcomm/tuning/tables/cpu.json

All candidates of a size are timed in one run, in alternating blocks, checked, the slowest rank counted.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import pathlib
import platform
import sys

import msgspec
import torch

from tcomm.cli.bench import parse_sizes
from tcomm.cli.workers import run_ranks
from tcomm.cpu.all_reduce import make_plan
from tcomm.groups.communicator import Communicator
from tcomm.signature import CallDescription
from tcomm.tuning.measure import Candidate, Schedule, summarise, time_alternating
from tcomm.tuning.table import Row, Table

CPU_ALGORITHMS = ("one_shot_push", "one_shot_pull", "two_shot")
TRITON_ALGORITHMS = ("one_shot_ll", "one_shot_push", "one_shot_pull", "two_shot")
PIECES = (0, 256 * 1024, 512 * 1024, 1024 * 1024, 2 * 1024 * 1024)


def measure(sizes, engine, schedule):
    """On every rank: {size: {"algorithm@piece": median microseconds}}."""
    with Communicator(timeout=120.0) as comm:
        comm.all_reduce(torch.zeros(1))
        return {str(nbytes): measure_size(comm, nbytes, engine, schedule) for nbytes in sizes}


def measure_size(comm, nbytes, engine, schedule):
    x = (torch.arange(nbytes // 4) % 7 + comm.rank).float()
    out = torch.empty_like(x)
    expected = torch.arange(nbytes // 4) % 7 * comm.world_size + sum(range(comm.world_size))

    def candidate(run):
        return Candidate(run, out.zero_, lambda: int((out != expected).sum()))

    candidates = {name: candidate(run) for name, run in runs(comm, x, out, engine, nbytes)}
    seconds, wrong = time_alternating(candidates, Schedule(*schedule), comm.barrier)
    assert not any(wrong.values()), wrong
    return {name: summarise(values, comm.all_gather_single).median_us for name, values in seconds.items()}


def runs(comm, x, out, engine, nbytes):
    if engine == "triton":
        for algorithm in TRITON_ALGORITHMS:
            name = f"triton:{algorithm}"
            yield f"{name}@0", functools.partial(comm.all_reduce, x, out=out, algorithm=name)
        return
    for algorithm in CPU_ALGORITHMS:
        for piece in PIECES:
            if piece < nbytes:
                name = f"cpu:{algorithm}"
                call = CallDescription("tune", "float32", (x.numel(), piece), "sum", algorithm=name)
                plan = make_plan(algorithm, comm._arena, call, "sum", x.dtype, x.shape, piece)
                yield f"{name}@{piece}", functools.partial(plan, x, out, 120.0)
    yield "torch:gloo@0", functools.partial(comm.all_reduce, x, out=out, algorithm="torch")


def rows_of(measured, ranks, min_ranks, max_ranks):
    """One row per run of sizes with the same winner."""
    rows = []
    for size, times in sorted(measured.items(), key=lambda item: int(item[0])):
        ours = {name: us for name, us in times.items() if not name.startswith("torch")}
        algorithm, piece = min(ours, key=ours.get).split("@")
        best = {}
        for name, us in times.items():
            plain = name.split("@")[0]
            best[plain] = min(round(us, 1), best.get(plain, float("inf")))
        row = Row(
            op="all_reduce", algorithm=algorithm, max_nbytes=int(size), min_ranks=min_ranks,
            max_ranks=max_ranks, piece_nbytes=int(piece), measured_us=best,
            measured_at=f"{ranks} ranks, {size} bytes",
        )  # fmt: skip
        if rows and (rows[-1].algorithm, rows[-1].piece_nbytes) == (row.algorithm, row.piece_nbytes):
            rows[-1] = row
        else:
            rows.append(row)
    rows[-1] = msgspec.structs.replace(rows[-1], max_nbytes=None)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--sizes", default="1KiB,16KiB,64KiB,256KiB,1MiB,4MiB,64MiB")
    parser.add_argument("--triton-sizes", default="1KiB,64KiB,1MiB")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--calls", type=int, default=30)
    given = parser.parse_args()
    rows = []
    for ranks, low, high in ((2, 2, 2), (4, 3, 16)):
        for engine, sizes, schedule in (
            ("cpu", given.sizes, (given.blocks, given.calls, 5)),
            ("triton", given.triton_sizes, (2, 3, 1)),
        ):
            measured = run_ranks(ranks, measure, parse_sizes(sizes), engine, schedule, timeout=1800.0)
            rows += rows_of(measured, ranks, low, high)
            print(ranks, engine, measured, flush=True)
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, no pinning"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    command = "python " + " ".join(sys.argv)
    table = Table(format=1, machine=machine, versions=versions, date=date, command=command, rows=tuple(rows))
    given.out.write_bytes(msgspec.json.format(table.encode(), indent=1) + b"\n")


if __name__ == "__main__":
    main()
