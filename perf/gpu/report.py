"""What a run found, as JSON and as a table."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from perf.gpu.measure import Row
from perf.gpu.plan import size_name


@dataclasses.dataclass
class Report:
    """All of a run. What was not measured is in it, with the reason."""

    machine: dict[str, Any]
    command: str
    started: str
    tests: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    rows: list[Row] = dataclasses.field(default_factory=list)
    baselines: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    not_measured: list[dict[str, str]] = dataclasses.field(default_factory=list)
    errors: list[dict[str, str]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def problems(self) -> list[str]:
        """Why the run is a failure; empty when it is none."""
        wrong = [
            f"wrong: {r.op} {r.algorithm} {size_name(r.nbytes)} of {r.world}" for r in self.rows if r.wrong
        ]
        failed = [f"tests {test['name']}: {test['result']}" for test in self.tests if test["is_failure"]]
        return wrong + failed + [f"error: {each['what']}: {each['reason']}" for each in self.errors]

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


HEADER = (
    "op", "algorithm", "ranks", "dtype", "bytes", "graph us (p10 to p90)", "eager us", "host us",
    "empty us", "read us", "floor us", "x floor", "GB/s",
)  # fmt: skip


def _cells(row: Row) -> tuple[str, ...]:
    graph = f"{row.graph_us:.1f} ({row.graph_us_p10:.1f} to {row.graph_us_p90:.1f})"
    if row.wrong:
        graph = f"WRONG: {row.wrong} elements"
    return (
        row.op, row.algorithm, str(row.world), row.dtype, size_name(row.nbytes), graph,
        f"{row.eager_us:.1f}", f"{row.host_us:.1f}", f"{row.empty_us:.1f}", f"{row.read_us:.1f}",
        f"{row.floor_us:.1f}", f"{row.ratio_to_floor:.2f}", f"{row.gbps:.0f}",
    )  # fmt: skip


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, tuple("-" * width for width in widths), *rows]
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]


def markdown(report: Report) -> str:
    """The same as the JSON, to read."""
    machine = report.machine
    lines = [f"# {machine.get('gpu', 'GPU')}, {report.started}", ""]
    lines += [f"* {name}: {value}" for name, value in machine.items()]
    lines += [f"* command: `{report.command}`, {report.seconds:.0f} s", ""]
    lines += [
        f"* tests, {test['name']}: {test['result']} in {test['seconds']:.0f} s" for test in report.tests
    ]
    order = sorted(report.rows, key=lambda r: (list(_ops(report)).index(r.op), r.world, r.dtype, r.nbytes))
    lines += ["", "## tcomm, virtual ranks", "", *table(HEADER, [_cells(row) for row in order])]
    if report.baselines:
        names = ("what", "ranks", "bytes", "graph us", "eager us", "note")
        cells = [
            (str(b["what"]), str(b["world"]), size_name(b["nbytes"]), _number(b["graph_us"]),
             _number(b["eager_us"]), str(b.get("note", "")))
            for b in report.baselines
        ]  # fmt: skip
        lines += ["", "## Others, and real ranks", "", *table(names, cells)]
    for title, entries in (("Errors", report.errors), ("Not measured", report.not_measured)):
        if entries:
            lines += ["", f"## {title}", "", *(f"* {each['what']}: {each['reason']}" for each in entries)]
    return "\n".join(lines) + "\n"


def _ops(report: Report) -> dict[str, None]:
    return dict.fromkeys(row.op for row in report.rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def write(report: Report, directory: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """`<directory>/<gpu>/<date>-<commit>.json`, and the table beside it."""
    gpu = "-".join(str(report.machine.get("gpu", "gpu")).lower().split()).replace("/", "-")
    folder = directory / gpu
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{report.started.replace(':', '').replace(' ', '-')}-{report.machine.get('commit', 'unknown')}"
    paths = folder / f"{name}.json", folder / f"{name}.md"
    paths[0].write_text(report.as_json())
    paths[1].write_text(markdown(report))
    return paths
