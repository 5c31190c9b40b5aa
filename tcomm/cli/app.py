"""The commands of `python -m tcomm`."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from tcomm.algorithms import reduce_op_name
from tcomm.cli.bench import HEADER, BenchRequest, columns, parse_outs, parse_sizes, run_bench
from tcomm.cli.cases import VERBS
from tcomm.cli.demo import run_demo
from tcomm.cli.eplb import EPLB_HEADER, EplbRequest, eplb_columns, run_eplb
from tcomm.cli.eplb_bench import (
    DRIFT_HEADER,
    EPLB_BENCH_HEADER,
    drift_columns,
    eplb_bench_columns,
    run_eplb_bench,
)
from tcomm.cli.explain import EXPLAIN_HEADER, Question, answers, explain_columns, title_of
from tcomm.cli.inspection import inspect_process
from tcomm.cli.moe_bench import MOE_HEADER, MoeRequest, moe_columns, run_moe_bench
from tcomm.cli.move_bench import MOVE_HEADER, MoveRequest, move_columns, run_move_bench
from tcomm.cli.object_bench import OBJECT_HEADER, ObjectRequest, object_columns, run_object_bench
from tcomm.cli.overhead_bench import OVERHEAD_HEADER, measure_overhead, overhead_columns, overhead_rows
from tcomm.cli.workers import why_no_mpi
from tcomm.config import Config
from tcomm.errors import ConfigError, TcommError
from tcomm.groups.moe.layers import BACKENDS
from tcomm.presets import PRESETS
from tcomm.tuning.decision import encode_decisions
from tcomm.tuning.measure import Schedule

__all__ = ["main"]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _console() -> Console:
    # Where there is no terminal, nothing may be wrapped or cut: somebody reads it with another program.
    return Console() if Console().is_terminal else Console(width=240)


_TEXT = frozenset({"algorithm", "call", "reason", "why not"})


def _table(title: str, header: tuple[str, ...], rows: list[list[str]]) -> None:
    table = RichTable(title=title, box=None)
    for name in header:
        table.add_column(name, justify="left" if name in _TEXT else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    _console().print(table)


@app.command()
def bench(
    op: Annotated[
        str,
        typer.Argument(
            help=f"a verb: {', '.join(VERBS)}; or object_broadcast, call_overhead, moe, eplb, expert_moves"
        ),
    ],
    ranks: Annotated[int, typer.Option(help="processes on this machine")] = 2,
    sizes: Annotated[
        str, typer.Option(help="bytes of the message, as nccl-tests counts it")
    ] = "1KiB,16KiB,256KiB,1MiB",
    readers: Annotated[str, typer.Option(help="of object_broadcast, instead of --ranks")] = "1,3",
    against: Annotated[
        str, typer.Option(help="baselines in the same run: gloo, mpi or both; of object_broadcast gloo, zmq")
    ] = "gloo",
    dtype: Annotated[str, typer.Option(help="element type; empty: float32, of moe bfloat16")] = "",
    redop: Annotated[str, typer.Option(help="reduce operation")] = "sum",
    algorithm: Annotated[str, typer.Option(help="engine, algorithm or both; empty: the table's")] = "",
    out: Annotated[str, typer.Option(help="reused, allocated, both, symmetric, in_place or all")] = "all",
    tokens: Annotated[str, typer.Option(help="of moe: tokens of a rank")] = "128,4096",
    hidden: Annotated[int, typer.Option(help="of moe: elements of a token")] = 7168,
    topk: Annotated[int, typer.Option(help="of moe: experts of a token")] = 8,
    experts: Annotated[int, typer.Option(help="of moe and expert_moves: experts of all ranks")] = 256,
    backends: Annotated[str, typer.Option(help="of moe: which; empty: all")] = "",
    blocks: Annotated[int, typer.Option(min=1, help="blocks of each candidate")] = 8,
    calls: Annotated[int, typer.Option(min=1, help="timed calls of a block")] = 30,
    pin: Annotated[bool, typer.Option(help="give each rank one core")] = False,
    timeout: Annotated[float, typer.Option(help="seconds for all of it")] = 900.0,
    json_file: Annotated[pathlib.Path | None, typer.Option("--json", help="write rows here")] = None,
) -> None:
    """Measure a collective against torch.distributed's and MPI's, in alternating blocks of checked calls.

    `call_overhead`: what the group layer adds to a call of the communicator, whose transport does nothing.
    `moe`: tokens to their experts and back, by every backend, against gloo with a row for each (token,
    expert), and with one for each (token, rank).
    `eplb`: where experts go, against the plain reference of the same run.
    `expert_moves`: a layer's experts from one map to another, --sizes being bytes of an expert.
    """
    if json_file is not None and not json_file.parent.is_dir():
        raise ConfigError(f"--json {json_file}: {json_file.parent} is no folder")
    if op == "call_overhead":
        _bench_call_overhead(Schedule(blocks, calls), json_file)
        return
    if op == "eplb":
        _bench_eplb(json_file)
        return
    schedule = Schedule(blocks, calls)
    if op == "object_broadcast":
        readers_of = _numbers("--readers", readers)
        against_of = tuple(against.split(","))
        objects = ObjectRequest(readers_of, parse_sizes(sizes), against_of, schedule, pin)
        _bench_objects(objects, timeout, json_file)
        return
    if op == "expert_moves":
        _bench_moves(MoveRequest(ranks, parse_sizes(sizes), experts, schedule, pin), timeout, json_file)
        return
    if op == "moe":
        chosen = tuple(filter(None, backends.split(","))) or tuple(BACKENDS)
        shape = (_numbers("--tokens", tokens), hidden, topk, experts, dtype or "bfloat16")
        _bench_moe(MoeRequest(ranks, *shape, chosen, schedule, pin), against, timeout, json_file)
        return
    request = BenchRequest(
        op, ranks, parse_sizes(sizes), dtype or "float32", reduce_op_name(redop), algorithm,
        parse_outs(op, out), schedule, pin, _baselines(against),
    )  # fmt: skip
    _bench_collective(request, timeout, json_file)


def _write(rows: Sequence[Mapping[str, Any]], json_file: pathlib.Path | None) -> None:
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=1) + "\n")


def _refuse_wrong(rows: Sequence[Mapping[str, Any]], told: str) -> None:
    if not all(row["checked"] for row in rows):
        raise TcommError(told)


def _bench_collective(request: BenchRequest, timeout: float, json_file: pathlib.Path | None) -> None:
    rows = run_bench(request, timeout)
    _write(rows, json_file)
    _table(
        f"{request.op}, {request.ranks} ranks, {rows[0]['affinity']}, torch {torch.__version__}",
        HEADER,
        columns(rows),
    )
    _refuse_wrong(rows, "some results were wrong")


def _bench_call_overhead(schedule: Schedule, json_file: pathlib.Path | None) -> None:
    found = measure_overhead(schedule)
    _write(overhead_rows(found), json_file)
    _table(f"a call in one process, torch {torch.__version__}", OVERHEAD_HEADER, overhead_columns(found))


def _bench_eplb(json_file: pathlib.Path | None) -> None:
    rows = run_eplb_bench()
    _write(rows, json_file)
    _table("plans from nothing, one thread", EPLB_BENCH_HEADER, eplb_bench_columns(rows))
    _table("plans from a map in force", DRIFT_HEADER, drift_columns(rows))
    _refuse_wrong(rows, "some plans differ from the reference's, or are not near enough to the full plan")


def _bench_moe(request: MoeRequest, against: str, timeout: float, json_file: pathlib.Path | None) -> None:
    if against != "gloo":
        raise ConfigError(f"--against {against!r}: moe is measured against gloo")
    rows = run_moe_bench(request, timeout)
    _write(rows, json_file)
    told = f"{request.ranks} ranks, hidden {request.hidden}, top {request.top_k} of {request.num_experts}"
    _table(f"moe, {told}, {rows[0]['affinity']}, torch {torch.__version__}", MOE_HEADER, moe_columns(rows))
    _refuse_wrong(rows, "some results were wrong")


def _bench_moves(request: MoveRequest, timeout: float, json_file: pathlib.Path | None) -> None:
    rows = run_move_bench(request, timeout)
    _write(rows, json_file)
    told = f"{rows[0]['experts']} experts in {rows[0]['slots']} slots, {request.ranks} ranks"
    _table(f"{told}, {rows[0]['affinity']}, torch {torch.__version__}", MOVE_HEADER, move_columns(rows))
    _refuse_wrong(rows, "some experts are not where they should be")


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} {text!r} is not numbers with commas between") from None


def _bench_objects(request: ObjectRequest, timeout: float, json_file: pathlib.Path | None) -> None:
    rows = run_object_bench(request, timeout)
    _write(rows, json_file)
    affinities = " / ".join(dict.fromkeys(row["affinity"] for row in rows))
    _table(f"object_broadcast, {affinities}, torch {torch.__version__}", OBJECT_HEADER, object_columns(rows))
    _refuse_wrong(rows, "some results were wrong")


def _baselines(names: str) -> tuple[str, ...]:
    """Those that can be measured here; one of several that cannot is skipped, aloud."""
    given = tuple(dict.fromkeys(name.strip() for name in names.split(",")))
    if len(given) > 1 and "mpi" in given and (reason := why_no_mpi()):
        typer.echo(f"mpi skipped: {reason}", err=True)
        return tuple(name for name in given if name != "mpi")
    return given


@app.command()
def demo(
    ranks: Annotated[int, typer.Option(help="processes on this machine")] = 4,
    timeout: Annotated[float, typer.Option(help="seconds for all of it")] = 240.0,
) -> None:
    """Run every collective on real processes, kernels included, and compare its bits with the reference."""
    result = run_demo(ranks, timeout)
    rows = [
        [
            r["verb"],
            r["algorithm"],
            r["dtype"],
            f"{r['median_us']:.1f}",
            "equal" if r["equal"] else "DIFFERENT",
        ]
        for r in result["rows"]
    ]
    _table(f"{ranks} ranks", ("verb", "algorithm", "dtype", "median us", "bits"), rows)
    for name, count in sorted(result["launches"].items()):
        typer.echo(f"launched {count:4d} x {name}")
    typer.echo(result["explanation"])
    if not result["ok"]:
        raise TcommError("some algorithm gave other bits than the reference")
    typer.echo("ok")


@app.command()
def eplb(
    loads: Annotated[
        pathlib.Path, typer.Argument(help="tokens that chose each expert: .npy, layers x experts")
    ],
    replicas: Annotated[int, typer.Option(help="slots for experts, over all GPUs")],
    gpus: Annotated[int, typer.Option(help="expert-parallel ranks")],
    nodes: Annotated[int, typer.Option(help="nodes that the GPUs are on")] = 1,
    groups: Annotated[int, typer.Option(help="groups of experts, each kept on one node")] = 1,
    current: Annotated[pathlib.Path | None, typer.Option(help="map in force: .npy, layers x slots")] = None,
    max_moves: Annotated[int | None, typer.Option(help="copies of a layer, at most; needs --current")] = None,
    policy: Annotated[str, typer.Option(help="what plans when copies do not matter")] = "search",
    plot: Annotated[pathlib.Path | None, typer.Option(help="draw GPU loads before and after")] = None,
    out: Annotated[pathlib.Path | None, typer.Option(help="write the new map here, as .npy")] = None,
) -> None:
    """Plan where experts go, and say how even the GPUs' load becomes and how much has to be copied."""
    result = run_eplb(
        EplbRequest(loads, replicas, gpus, nodes, groups, current, max_moves, policy, plot, out)
    )
    typer.echo(f"{result.plan.policy}: {result.plan.reason}")
    _table(f"{len(result.load)} layers on {gpus} GPUs", EPLB_HEADER, eplb_columns(result))


@app.command()
def explain(
    op: Annotated[str, typer.Argument(help="collective, such as all_gather")],
    sizes: Annotated[
        str,
        typer.Option("--sizes", "--nbytes", help="bytes, as nccl-tests counts them: 1KiB,1MiB or 1KiB..1MiB"),
    ],
    topology: Annotated[
        str, typer.Option(help=f"GPUs: {', '.join(PRESETS)}, ...; empty: processes of this machine")
    ] = "",
    ranks: Annotated[int, typer.Option(min=0, help="number of ranks; 0: the topology's, or 2")] = 0,
    dtype: Annotated[str, typer.Option(help="element type")] = "float32",
    redop: Annotated[str, typer.Option(help="reduce operation")] = "sum",
    algorithm: Annotated[str, typer.Option(help="engine, algorithm or both")] = "",
    deterministic: Annotated[bool, typer.Option(help="nothing that adds in an order of its own")] = False,
    symmetric: Annotated[bool, typer.Option(help="out= is a tensor of symmetric_empty")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the decisions themselves")] = False,
) -> None:
    """Say which algorithm a group would use, here or on GPUs that are not at hand, and why not the others."""
    question = Question(
        op, parse_sizes(sizes), topology, ranks, dtype, redop, algorithm, deterministic, symmetric
    )  # fmt: skip
    decisions = answers(question, Config.from_environment())
    if as_json:
        typer.echo(encode_decisions(decisions).decode())
    elif not topology:
        typer.echo("\n".join(str(decision) for decision in decisions))
    else:
        _table(title_of(question, decisions[0]), EXPLAIN_HEADER, explain_columns(decisions))
        if len(decisions) == 1:
            _table("not used", ("algorithm", "why not"), [list(row) for row in decisions[0].rejected])


@app.command()
def inspect(pid: Annotated[int, typer.Argument(help="process id of a rank")]) -> None:
    """Show what a process's groups are doing, also while it hangs."""
    try:
        groups = inspect_process(pid)
    except OSError as error:
        raise ConfigError(f"process {pid}: {error.strerror}") from error
    if not groups:
        typer.echo(f"process {pid} is in no group of tcomm's that has shared memory")
    for group in groups:
        for key, value in group.items():
            typer.echo(f"{key}: {value}")
        typer.echo("")


@app.command()
def env() -> None:
    """List every TCOMM_ variable, its value, and whether it is set."""
    config = Config.from_environment()
    rows = []
    for field in Config.__struct_fields__:
        name = f"TCOMM_{field.upper()}"
        rows.append([name, str(getattr(config, field)) or '""', "set" if name in os.environ else "default"])
    _table("environment", ("variable", "value", "from"), rows)


def main() -> None:
    """Run the command line; an error of tcomm is a sentence and exit code 1, not a traceback."""
    try:
        app()
    except TcommError as error:
        typer.echo(f"tcomm: {type(error).__name__}: {error}", err=True)
        raise SystemExit(1) from None
