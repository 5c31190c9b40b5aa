"""`python -m perf.gpu`: tests and figures of one GPU (and of more, where there are), in eight minutes."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import pathlib
import shlex
import sys

BUDGET = 480.0
NEEDED = ("torch", "triton", "numpy", "msgspec", "platformdirs")
WRONG, UNUSABLE = 1, 2


def why_not() -> str:
    """Why nothing can be measured here, and what to do; empty when it can."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return f"perf.gpu: {', '.join(missing)} cannot be imported; run: pip install -e ."
    import torch

    if not torch.cuda.is_available():
        return f"perf.gpu: there is no CUDA device for torch {torch.__version__}; nothing was measured"
    if torch.version.hip is not None:
        return "perf.gpu: timings and floors are made for CUDA; nothing was measured"
    return ""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perf.gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds that all of it may take")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parents[1] / "results")
    parser.add_argument("--worlds", default="8,2,4", help="numbers of virtual ranks, in this order")
    parser.add_argument("--sizes", default="", help="bytes, separated by commas; 1 KiB to 64 MiB where empty")
    parser.add_argument("--ops", default="", help="all_reduce, reduce_scatter, all_gather, all_to_all; all")
    parser.add_argument("--mode", choices=("grid", "streams"), default="grid", help="of virtual ranks")
    parser.add_argument("--flush-l2", action="store_true", help="one call a replay, with a cold cache")
    parser.add_argument("--no-tests", action="store_true", help="figures only")
    parser.add_argument("--no-others", action="store_true", help="neither torch's operations nor NCCL")
    return parser.parse_args(arguments)


def other_commands(devices: int) -> list[tuple[str, list[str]]]:
    """What to compare with: on one GPU only torch's own kernels, and there alone or in turns."""
    worlds = [1, 2] if devices == 1 else sorted({2, devices})
    impls = ["symm_mem_one_shot", "symm_mem_two_shot"]
    impls += ["nccl", "nccl_symmetric", "tcomm"] if devices > 1 else []
    return [
        (
            f"{impl}, {world} ranks",
            [sys.executable, "-m", "perf.gpu.peers", "--impl", impl, "--world", str(world)],
        )
        for world in worlds
        for impl in impls
    ]


def main(arguments: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    reason = why_not()
    if reason:
        print(reason, file=sys.stderr)
        return UNUSABLE
    # Before Triton is imported: kernels of this process are compiled.
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    from perf.gpu.device import CudaDevice

    return run(options, CudaDevice(options.flush_l2))


def run(options: argparse.Namespace, device: object, test_commands: list | None = None) -> int:
    """All that comes after the choice of the device."""
    import dataclasses

    import torch

    from perf.gpu import machine, plan, report, suite

    budget = plan.Budget(options.budget, device.now)
    found = machine.describe()
    print("\n".join(f"{name}: {value}" for name, value in found.items()), flush=True)
    worlds = tuple(int(world) for world in options.worlds.split(","))
    sizes = tuple(int(size) for size in options.sizes.split(",")) if options.sizes else plan.SIZES
    float32 = plan.FLOAT32_NBYTES if plan.FLOAT32_NBYTES in sizes else sizes[0]
    cases = [dataclasses.replace(case, mode=options.mode) for case in plan.make_plan(worlds, sizes, float32)]
    cases = [case for case in cases if not options.ops or case.op in options.ops.split(",")]
    started = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H%M")
    command = shlex.join(["python", "-m", "perf.gpu", *sys.argv[1:]])
    result = report.Report(found, command, started)
    tests = suite.test_commands() if test_commands is None else test_commands
    others = [] if options.no_others else other_commands(torch.cuda.device_count())
    try:
        suite.run_all(
            result, device, cases, budget, [] if options.no_tests else tests, others,
            say=lambda line: print(line, flush=True),
        )  # fmt: skip
    finally:
        # However it ends, what was measured is written.
        result.machine |= {
            f"{name} at the end": value for name, value in machine.clocks().items() if "mhz" in name
        }
        result.seconds = budget.spent
        paths = report.write(result, options.out)
    print(report.markdown(result))
    print(f"{result.seconds:.0f} s; written: {paths[0]} and {paths[1].name}")
    for problem in result.problems:
        print(problem, file=sys.stderr)
    return WRONG if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
