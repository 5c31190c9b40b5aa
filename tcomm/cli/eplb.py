"""`tcomm eplb`: plan where experts go from a file of loads, and show what it brings."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
from typing import Any

import numpy as np

from tcomm.eplb import Plan, Shape, balancedness, gpu_loads, initial_map, make_plan, replan
from tcomm.eplb.shapes import FloatArray, IntArray
from tcomm.errors import CapabilityError, ConfigError

__all__ = ["EPLB_HEADER", "EplbRequest", "EplbResult", "eplb_columns", "plot_loads", "run_eplb"]

EPLB_HEADER = ("map", "balancedness", "worst layer", "bound", "copies", "of slots", "rounds", "ms")
"""Titles of `eplb_columns`."""


@dataclasses.dataclass(frozen=True)
class EplbRequest:
    """What to plan."""

    loads: pathlib.Path
    """A .npy file, [layers, experts]."""
    num_replicas: int
    """Slots."""
    num_gpus: int
    """Expert-parallel ranks."""
    num_nodes: int = 1
    """Nodes."""
    num_groups: int = 1
    """Groups of experts."""
    current: pathlib.Path | None = None
    """A .npy file with the map in force, [layers, slots]; None: the initial map."""
    max_moves: int | None = None
    """Copies of a layer, at most; then the plan starts from the current map."""
    policy: str = "search"
    """What plans, where the number of copies does not matter."""
    plot: pathlib.Path | None = None
    """Where a picture goes."""
    out: pathlib.Path | None = None
    """Where the new map goes, as .npy."""


@dataclasses.dataclass(frozen=True, eq=False)
class EplbResult:
    """What was planned."""

    load: FloatArray
    """[layers, experts]."""
    before: IntArray
    """[layers, slots]."""
    plan: Plan
    """The new map, and how good it is."""


def _read(path: pathlib.Path, what: str) -> np.ndarray[Any, Any]:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{what} {path} cannot be read: {error}; give a .npy file of numbers") from None
    if not isinstance(array, np.ndarray) or array.ndim != 2:
        raise ConfigError(f"{what} {path} holds no array with two axes; the first is layers")
    return array


def _check_outputs(request: EplbRequest) -> None:
    """Before anything is planned."""
    for path in (request.plot, request.out):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{path}: {path.parent} is no folder")
    if request.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise CapabilityError("--plot needs matplotlib, which is not installed; it comes with tcomm[plot]")


def run_eplb(request: EplbRequest) -> EplbResult:
    """Plan, and write what is to be written.

    Raises:
        ConfigError: when a file, a number or their combination makes no sense.
        CapabilityError: when a picture is asked for and matplotlib is not installed.
    """
    _check_outputs(request)
    if request.max_moves is not None and request.current is None:
        raise ConfigError("--max-moves is counted from a map; give it with --current MAP.npy")
    load = _read(request.loads, "the load")
    shape = Shape(
        load.shape[1], request.num_replicas, request.num_groups, request.num_nodes, request.num_gpus
    )
    current = None if request.current is None else _read(request.current, "the current map")
    if current is not None and request.max_moves is not None:
        plan = replan(load, shape, current=current, max_moves=request.max_moves)
    else:
        plan = make_plan(load, shape, policy=request.policy, current=current)
    before = np.tile(initial_map(shape), (len(load), 1)) if current is None else current.astype(np.int64)
    result = EplbResult(load.astype(np.float64), before, plan)
    if request.out is not None:
        np.save(request.out, plan.phy2log, allow_pickle=False)
    if request.plot is not None:
        plot_loads(result, request.plot)
    return result


def eplb_columns(result: EplbResult) -> list[list[str]]:
    """Rows of a table: the map before and the plan."""
    plan, moves = result.plan, result.plan.diff(result.before)
    old = balancedness(result.before, result.load, plan.shape.num_gpus)
    bound = f"{_mean(plan.bound):.4f}"
    copied = moves.num_copies / max(1, plan.phy2log.size)
    return [
        ["before", f"{_mean(old):.4f}", f"{old.min(initial=1):.4f}", bound, "", "", "", ""],
        [
            "after",
            f"{_mean(plan.balancedness):.4f}",
            f"{plan.balancedness.min(initial=1):.4f}",
            bound,
            str(moves.num_copies),
            f"{copied:.1%}",
            str(moves.num_rounds),
            f"{1e3 * plan.seconds:.1f}",
        ],
    ]


def _mean(values: FloatArray) -> float:
    return float(values.mean()) if len(values) else 1.0


def plot_loads(result: EplbResult, path: pathlib.Path) -> None:
    """Draw the load of each GPU in each layer, before and after, on one scale.

    Args:
        result: what was planned.
        path: a picture; its suffix says of which kind.

    Raises:
        ConfigError: when the suffix is of no kind that can be drawn.
    """
    # Drawn without pyplot: no window, no state left behind.
    from matplotlib.figure import Figure

    num_gpus = result.plan.shape.num_gpus
    parts = []
    for phy2log in (result.before, result.plan.phy2log):
        loads = gpu_loads(phy2log, result.load, num_gpus)
        mean = loads.mean(axis=1, keepdims=True)
        parts.append(np.divide(loads, mean, out=np.ones_like(loads), where=mean > 0))
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    top = max(float(part.max(initial=1)) for part in parts)
    for axis, part, title in zip(axes, parts, ("before", "after"), strict=True):
        even = float(np.mean(1 / part.max(axis=1))) if len(part) else 1.0
        image = axis.imshow(part, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=top)
        axis.set(title=f"{title}: balancedness {even:.3f}", xlabel="GPU")
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="load of the GPU over the layer's mean")
    try:
        figure.savefig(path)
    except ValueError as error:
        raise ConfigError(f"--plot {path}: {error}") from None
