"""`tcomm bench eplb`: planning, how fast and how good, against the plain reference of the same run."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tcomm.eplb import Plan, Shape, balancedness, balancedness_bound, make_plan, replan, split_tokens
from tcomm.eplb.balance import balanced_maps, balanced_slots
from tcomm.eplb.reference import reference_maps
from tcomm.eplb.search import improved
from tcomm.eplb.shapes import FloatArray

__all__ = [
    "DRIFT_CASES",
    "DRIFT_HEADER",
    "EPLB_BENCH_HEADER",
    "EPLB_CASES",
    "EplbCase",
    "drift_columns",
    "eplb_bench_columns",
    "eplb_loads",
    "measure_case",
    "measure_drift",
    "run_eplb_bench",
]

_ROUNDS = 7
_PLAN_MS, _PLAN_RATIO = 6.0, 25.0
_SEARCH_MS, _SEARCH_RATIO = 25.0, 6.0
_DRIFT_LOSS, _DRIFT_MOVES = 0.005, 0.25


@dataclasses.dataclass(frozen=True)
class EplbCase:
    """A load on a machine."""

    num_layers: int
    """L."""
    shape: Shape
    """The other numbers."""
    load: str
    """zipf1.2, zipf0.8 or lognormal."""
    target: float | None = None
    """Balancedness after the search, at least."""
    drift: float = 0.0
    """Spread of the load's change since the map in force was made: sigma of a lognormal factor."""

    @property
    def name(self) -> str:
        """Layers/experts/slots on GPUs, and where experts may go."""
        where = f"{self.shape.num_nodes} nodes" if self.shape.num_nodes > 1 else "global"
        numbers = f"{self.num_layers}/{self.shape.num_experts}/{self.shape.num_replicas}"
        return f"{numbers} on {self.shape.num_gpus}, {where}"


def _cases(
    num_layers: int, shape: Shape, targets: tuple[float | None, float | None, float | None]
) -> list[EplbCase]:
    loads = ("zipf1.2", "zipf0.8", "lognormal")
    return [EplbCase(num_layers, shape, load, target) for load, target in zip(loads, targets, strict=True)]


_ON_NODES, _ON_32 = Shape(256, 288, 8, 4, 32), Shape(256, 288, 1, 1, 32)
_ON_64, _ON_16 = Shape(256, 320, 1, 1, 64), Shape(128, 160, 1, 1, 16)
EPLB_CASES = (
    *_cases(58, _ON_NODES, (0.508, 0.867, 0.937)),
    *_cases(58, _ON_32, (0.991, 0.9997, 0.9995)),
    *_cases(61, _ON_64, (0.906, 0.998, 0.997)),
    *_cases(48, _ON_16, (0.9998, None, None)),
)
"""What is planned from nothing."""
DRIFT_CASES = (
    EplbCase(58, _ON_32, "zipf0.8", drift=0.1),
    EplbCase(58, _ON_32, "zipf1.2", drift=0.1),
    EplbCase(61, _ON_64, "lognormal", drift=0.1),
    EplbCase(61, _ON_64, "lognormal", drift=0.3),
    EplbCase(48, _ON_16, "zipf1.2", drift=0.1),
)
"""What is planned from a map that was made for a slightly different load."""


def eplb_loads(case: EplbCase) -> FloatArray:
    """The load of a case: [L, E], the same on every machine.

    zipf a: the e-th of a random order of experts has `(1 + e) ** -a`, times a factor of 0.8 to 1.2.
    """
    generator, shape = np.random.default_rng(0), (case.num_layers, case.shape.num_experts)
    if case.load == "lognormal":
        return 1e6 * generator.lognormal(0, 1, shape)
    falling = (1 + np.arange(shape[1])) ** -float(case.load.removeprefix("zipf"))
    falling /= falling.sum()
    rows = np.stack([generator.permutation(falling) for _ in range(shape[0])])
    return 1e6 * rows * generator.uniform(0.8, 1.2, shape)


def measure_case(case: EplbCase, rounds: int = _ROUNDS) -> dict[str, Any]:
    """Time the plain plan, the fast one and the search in turn.

    Args:
        case: what to plan.
        rounds: plans of each kind.

    Returns:
        A row. Times are medians in milliseconds: `_ms` of this thread's processor, which others on the
        machine disturb least, `_wall_ms` by the clock.
    """
    load, shape = eplb_loads(case), case.shape
    found: dict[str, Any] = {}

    def search() -> Any:
        return improved(balanced_slots(load, shape)[0], load, shape)

    work: dict[str, Callable[[], Any]] = {
        "reference": lambda: reference_maps(load, shape),
        "plan": lambda: balanced_maps(load, shape),
        "search": search,
    }
    times: dict[str, list[float]] = {f"{name}{unit}": [] for name in work for unit in ("_ms", "_wall_ms")}
    for _ in range(rounds):
        for name, call in work.items():
            busy, start = time.thread_time(), time.perf_counter()
            found[name] = call()
            times[f"{name}_ms"].append(1e3 * (time.thread_time() - busy))
            times[f"{name}_wall_ms"].append(1e3 * (time.perf_counter() - start))
    return _row(case, load, found, {name: statistics.median(values) for name, values in times.items()})


def _row(
    case: EplbCase, load: FloatArray, found: dict[str, Any], medians: dict[str, float]
) -> dict[str, Any]:
    gpus, searched = case.shape.num_gpus, found["search"]
    share = split_tokens(load, searched, case.shape)
    even = float(balancedness(searched, load, gpus).mean())
    ratios = {name: medians["reference_ms"] / medians[f"{name}_ms"] for name in ("plan", "search")}
    return {
        "op": "eplb",
        "case": case.name,
        "load": case.load,
        **medians,
        "plan_ratio": ratios["plan"],
        "search_ratio": ratios["search"],
        "plan_balancedness": float(balancedness(found["plan"][0], load, gpus).mean()),
        "balancedness": even,
        "split_balancedness": float(balancedness(searched, load, gpus, share).mean()),
        "bound": float(balancedness_bound(load, case.shape).mean()),
        "target": case.target,
        "even_enough": case.target is None or even >= case.target,
        "fast_enough": (medians["plan_ms"] <= _PLAN_MS or ratios["plan"] >= _PLAN_RATIO)
        and (medians["search_ms"] <= _SEARCH_MS or ratios["search"] >= _SEARCH_RATIO),
        "checked": all(map(np.array_equal, found["plan"], found["reference"])),
    }


def measure_drift(case: EplbCase) -> dict[str, Any]:
    """Plan for a load that has changed: the old map, a full plan, and one near the old map."""
    old_load = eplb_loads(case)
    load = old_load * np.random.default_rng(1).lognormal(0, case.drift, old_load.shape)
    old = make_plan(old_load, case.shape)
    full = make_plan(load, case.shape, current=old.phy2log)
    near = replan(
        load, case.shape, current=old.phy2log, max_moves=int(_DRIFT_MOVES * case.shape.num_replicas)
    )
    moved, full_moved = _moved(near, old), _moved(full, old)
    loss = float(full.balancedness.mean() - near.balancedness.mean())
    return {
        "op": "eplb_drift",
        "case": case.name,
        "load": case.load,
        "drift": case.drift,
        "kept": float(balancedness(old.phy2log, load, case.shape.num_gpus).mean()),
        "full": float(full.balancedness.mean()),
        "full_moved": full_moved,
        "near": float(near.balancedness.mean()),
        "near_moved": moved,
        "near_ms": 1e3 * near.seconds,
        "checked": loss <= _DRIFT_LOSS and moved <= _DRIFT_MOVES,
    }


def _moved(plan: Plan, old: Plan) -> float:
    return plan.diff(old.phy2log).num_copies / plan.phy2log.size


def run_eplb_bench(rounds: int = _ROUNDS) -> list[dict[str, Any]]:
    """All cases: a row for each."""
    rows = [measure_case(case, rounds) for case in EPLB_CASES]
    return rows + [measure_drift(case) for case in DRIFT_CASES]


EPLB_BENCH_HEADER = (
    "case", "load", "reference (ms)", "plan (ms)", "ratio", "search (ms)", "ratio",
    "plan", "search", "split", "bound", "target", "fast", "even", "equal",
)  # fmt: skip
"""Titles of `eplb_bench_columns`."""
DRIFT_HEADER = ("case", "load", "drift", "kept", "full plan", "moves", "near plan", "moves", "ms", "ok")
"""Titles of `drift_columns`."""


def _said(value: bool) -> str:
    return "yes" if value else "NO"


def eplb_bench_columns(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows for people of what is planned from nothing."""
    return [
        [
            row["case"],
            row["load"],
            f"{row['reference_ms']:.0f}",
            f"{row['plan_ms']:.1f}",
            f"{row['plan_ratio']:.1f}",
            f"{row['search_ms']:.1f}",
            f"{row['search_ratio']:.1f}",
            *(f"{row[f'{name}balancedness']:.4f}" for name in ("plan_", "", "split_")),
            f"{row['bound']:.4f}",
            "" if row["target"] is None else str(row["target"]),
            *(_said(row[name]) for name in ("fast_enough", "even_enough", "checked")),
        ]
        for row in rows
        if row["op"] == "eplb"
    ]


def drift_columns(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows for people of what is planned from a map in force."""
    return [
        [
            row["case"],
            row["load"],
            f"{row['drift']:.0%}",
            f"{row['kept']:.4f}",
            f"{row['full']:.4f}",
            f"{row['full_moved']:.0%}",
            f"{row['near']:.4f}",
            f"{row['near_moved']:.0%}",
            f"{row['near_ms']:.0f}",
            _said(row["checked"]),
        ]
        for row in rows
        if row["op"] == "eplb_drift"
    ]
