"""The session of the suite: its options, its ranks, and the one table at its end."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from rich.table import Table

from perf.cases import IMPLS, Bench, keys
from tcomm.tuning.measure import percentiles

BENCH = pytest.StashKey[Bench]()


def pytest_addoption(parser):
    group = parser.getgroup("collectives")
    group.addoption("--sizes", default="1KiB,64KiB,1MiB,16MiB", help="bytes of the messages")
    group.addoption("--worlds", default="2,4", help="numbers of ranks")
    group.addoption("--out", default="reused", choices=("reused", "allocated"), help="where results go")
    group.addoption("--blocks", type=int, default=5, help="blocks of each contender")
    group.addoption("--calls", type=int, default=12, help="timed calls of a block; fewer of long messages")


def pytest_generate_tests(metafunc):
    if "impl" in metafunc.fixturenames:
        option = metafunc.config.getoption
        params = [
            pytest.param(key.op, key.nbytes, key.ranks, key.out, impl, id=f"{key.id}-{impl}")
            for key in keys(option("sizes"), option("worlds"), option("out"))
            for impl in IMPLS
        ]
        metafunc.parametrize(("op", "nbytes", "ranks", "out", "impl"), params)


@pytest.fixture(scope="session")
def bench(pytestconfig):
    bench = Bench(pytestconfig.getoption("blocks"), pytestconfig.getoption("calls"))
    pytestconfig.stash[BENCH] = bench
    yield bench
    bench.close()


def pytest_terminal_summary(config):
    bench = config.stash.get(BENCH, None)
    if bench is None or not bench.measured:
        return
    console = Console() if Console().is_terminal else Console(width=200)
    console.print(_table(bench))


def _table(bench):
    affinities = ", ".join(sorted({measured.affinity for measured in bench.measured.values()}))
    names = {"tcomm": "tcomm", "gloo": "gloo", "mpi": "MPI"}
    title = f"microseconds: median (p10 to p90), slowest rank; {affinities}; torch {torch.__version__}"
    table = Table(title=title, caption=bench.no_mpi and f"MPI skipped: {bench.no_mpi}", box=None)
    for name in ("op", "size", "ranks", "out", *names.values(), "gloo/tcomm", "MPI/tcomm", "algorithm"):
        table.add_column(name, justify="left" if name in {"op", "algorithm"} else "right", no_wrap=True)
    for key, measured in bench.measured.items():
        summaries = {name: percentiles(values) for name, values in measured.microseconds.items()}
        ours = summaries["tcomm"].median_us
        table.add_row(
            key.op, key.size, str(key.ranks), key.out,
            *(_cell(summaries.get(name)) for name in names),
            *(_ratio(summaries.get(name), ours) for name in ("gloo", "mpi")), measured.algorithm,
        )  # fmt: skip
    return table


def _ratio(summary, ours):
    return "-" if summary is None else f"{summary.median_us / ours:.3g}"


def _cell(summary):
    if summary is None:
        return "-"
    return f"{summary.median_us:.1f} ({summary.p10_us:.1f} to {summary.p90_us:.1f})"
