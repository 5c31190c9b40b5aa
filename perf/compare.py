"""Compare two runs of the suite, case by case.

    python perf/compare.py OLD.json NEW.json --fail-above 1.2

On a machine that others use too, microseconds of two days say little. So a case is judged by tcomm's time as
a share of gloo's from the same run, and called changed only where the intervals of the two runs do not
overlap.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from tcomm.errors import ConfigError

RESAMPLES = 1000
INTERVAL = (2.5, 97.5)


class Stats(msgspec.Struct):
    data: list[float]


class Info(msgspec.Struct):
    op: str
    nbytes: int
    ranks: int
    out: str
    dtype: str
    impl: str
    affinity: str
    blocks: int


class Entry(msgspec.Struct):
    extra_info: Info
    stats: Stats


class Run(msgspec.Struct):
    benchmarks: list[Entry]


Key = tuple[str, int, int, str, str]
Case = dict[str, np.ndarray]
"""Seconds by contender, a row for each block."""


@dataclasses.dataclass(frozen=True)
class Share:
    """tcomm's time over the baseline's, in one run."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a case."""

    key: Key
    us: tuple[float, float]
    """tcomm's medians, old and new."""
    shares: tuple[Share, Share] | None
    """None: some run has no baseline for it."""

    @property
    def change(self) -> float:
        """How many times slower it got, relative to the baseline."""
        assert self.shares is not None
        return self.shares[1].value / self.shares[0].value

    @property
    def is_changed(self) -> bool:
        if self.shares is None:
            return False
        old, new = self.shares
        return new.low > old.high or new.high < old.low

    @property
    def word(self) -> str:
        if self.shares is None:
            return "no baseline"
        if not self.is_changed:
            return "same"
        return "slower" if self.change > 1 else "faster"


def load(path: pathlib.Path) -> dict[Key, Case]:
    """Every case of a run.

    Raises:
        ConfigError: when the file is not the JSON of a run of this suite.
    """
    try:
        run = msgspec.json.decode(path.read_bytes(), type=Run)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path} is not a run of `make bench`: {error}") from error
    cases: dict[Key, Case] = {}
    for entry in run.benchmarks:
        info, data = entry.extra_info, entry.stats.data
        if not data or info.blocks < 1 or len(data) % info.blocks or min(data) <= 0:
            raise ConfigError(f"{path} is not a run of `make bench`: {info.op} has no blocks of calls")
        key = (info.op, info.nbytes, info.ranks, info.out, info.dtype)
        cases.setdefault(key, {})[info.impl] = np.array(data).reshape(info.blocks, -1)
    if not any("tcomm" in case for case in cases.values()):
        raise ConfigError(f"{path}: tcomm was not measured in this run")
    return cases


def share_of(case: Case, baseline: str) -> Share | None:
    """tcomm's median over the baseline's, with a bootstrap interval.

    Whole blocks are drawn, the same of both: calls of a block have more in common than their spread tells.
    """
    if not {"tcomm", baseline} <= case.keys() or len(case["tcomm"]) != len(case[baseline]):
        return None
    ours, theirs = case["tcomm"], case[baseline]
    blocks = np.random.default_rng(0).integers(len(ours), size=(RESAMPLES, len(ours)))
    medians = [np.median(rows[blocks].reshape(RESAMPLES, -1), axis=1) for rows in (ours, theirs)]
    low, high = np.percentile(medians[0] / medians[1], INTERVAL)
    return Share(float(np.median(ours) / np.median(theirs)), float(low), float(high))


def compare(old: dict[Key, Case], new: dict[Key, Case], baseline: str) -> list[Verdict]:
    """A verdict for every case that both runs have of tcomm."""
    verdicts = []
    for key in (key for key in new if "tcomm" in new[key] and "tcomm" in old.get(key, {})):
        shares = share_of(old[key], baseline), share_of(new[key], baseline)
        us = tuple(float(np.median(run[key]["tcomm"])) * 1e6 for run in (old, new))
        both = None if shares[0] is None or shares[1] is None else (shares[0], shares[1])
        verdicts.append(Verdict(key, (us[0], us[1]), both))
    return verdicts


def table_of(verdicts: list[Verdict], baseline: str) -> Table:
    table = Table(title=f"tcomm's time over {baseline}'s of the same run (95% interval)", box=None)
    names = ("op", "bytes", "ranks", "out", "dtype", "old us", "new us", "new/old", "old share", "new share")
    for name in (*names, "relative", "verdict"):
        table.add_column(name, justify="left" if name in {"op", "verdict"} else "right", no_wrap=True)
    for verdict in verdicts:
        old_us, new_us = verdict.us
        shares = ["-", "-", "-"]
        if verdict.shares is not None:
            shares = [f"{s.value:.4f} ({s.low:.4f} to {s.high:.4f})" for s in verdict.shares]
            shares.append(f"{verdict.change:.2f}")
        table.add_row(
            *map(str, verdict.key), f"{old_us:.1f}", f"{new_us:.1f}", f"{new_us / old_us:.2f}", *shares,
            verdict.word,
        )  # fmt: skip
    return table


def main(
    old: Annotated[pathlib.Path, typer.Argument(help="JSON of a run")],
    new: Annotated[pathlib.Path, typer.Argument(help="JSON of a later run")],
    against: Annotated[str, typer.Option(help="baseline: gloo or mpi")] = "gloo",
    fail_above: Annotated[
        float | None,
        typer.Option(help="fail when a case got this many times slower, relative to the baseline"),
    ] = None,
) -> None:
    """Compare two runs of the suite, case by case."""
    if against not in {"gloo", "mpi"}:
        _fail(f"--against {against!r} is neither gloo nor mpi")
    try:
        runs = load(old), load(new)
    except ConfigError as error:
        _fail(str(error))
    verdicts = compare(*runs, against)
    if not verdicts:
        _fail(f"{old} and {new} have no case in common")
    console = Console() if Console().is_terminal else Console(width=200)
    console.print(table_of(verdicts, against))
    for path, run, other in ((old, *runs), (new, *runs[::-1])):
        if alone := sorted(key for key in run if key not in other):
            typer.echo(f"only in {path}: {', '.join('-'.join(map(str, key)) for key in alone)}")
    if fail_above is not None:
        _judge(verdicts, fail_above, against)


def _judge(verdicts: list[Verdict], fail_above: float, against: str) -> None:
    if all(verdict.shares is None for verdict in verdicts):
        _fail(f"no case can be judged: no run of both has {against}")
    slower = [verdict for verdict in verdicts if verdict.is_changed and verdict.change > fail_above]
    for verdict in slower:
        name = "-".join(map(str, verdict.key))
        typer.echo(f"{name}: {verdict.change:.2f} times slower than it was, relative to {against}", err=True)
    if slower:
        raise typer.Exit(1)


def _fail(told: str) -> None:
    typer.echo(f"compare: {told}", err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    typer.run(main)
