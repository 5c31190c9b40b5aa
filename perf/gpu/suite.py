"""The run: tests, then what others do, then every case, until the time is up."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import IO, Any

import torch

from perf.gpu.machine import ROOT
from perf.gpu.measure import Device, measure
from perf.gpu.plan import Budget, Case
from perf.gpu.report import Report
from tcomm import VirtualRanks

REPORT_SECONDS = 10.0
"""Kept for writing the report."""
TESTS_SHARE, OTHERS_SHARE = 0.4, 0.15
"""Of the budget, at most."""
TESTS = {
    "device": ("tests/gpu/test_device.py",),
    "2 ranks": ("tests/gpu/test_worlds.py", "-k", "2ranks"),
    "4 ranks": ("tests/gpu/test_worlds.py", "-k", "4ranks"),
    "8 ranks": ("tests/gpu/test_worlds.py", "-k", "8ranks"),
    "rest of the worlds": ("tests/gpu/test_worlds.py", "-k", "not 2ranks and not 4ranks and not 8ranks"),
    "token exchanges of 2 ranks": ("tests/gpu/test_moe.py", "-k", "2ranks"),
    "token exchanges of 4 ranks": ("tests/gpu/test_moe.py", "-k", "4ranks"),
    "token exchanges of 8 ranks": ("tests/gpu/test_moe.py", "-k", "8ranks"),
    "rest of token exchanges": ("tests/gpu/test_moe.py", "-k", "not 2ranks and not 4ranks and not 8ranks"),
    "graphs": ("tests/gpu/test_graphs.py",),
    "faults": ("tests/gpu/test_faults.py",),
    "processes": ("tests/gpu/test_processes.py",),
}
"""Run side by side: most of their time goes into compiling."""
Command = tuple[str, list[str]]


def test_commands() -> list[Command]:
    base = [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", "--color=no"]
    return [(name, [*base, *arguments]) for name, arguments in TESTS.items()]


def run_tests(report: Report, commands: Sequence[Command], seconds: float, now: Callable[[], float]) -> None:
    """Run all of them at once; whoever is not done in time is killed, and that is its result."""
    if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("pytest_timeout") is None:
        report.not_measured.append({"what": "tests", "reason": "pytest and pytest-timeout are not installed"})
        return
    started = now()
    environment = {"TRITON_INTERPRET": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    running = [(name, Child(command, environment)) for name, command in commands]
    for name, child in running:
        in_time = child.wait(max(1.0, seconds - (now() - started)))
        output = child.output
        lines = output.strip().splitlines()
        result = lines[-1] if lines else f"exit code {child.returncode} and no word"
        # 5: nothing was selected.
        is_failure = not in_time or child.returncode not in {0, 5}
        report.tests.append(
            {
                "name": name, "result": result if in_time else f"not done in {seconds:.0f} s; killed",
                "is_failure": is_failure, "seconds": now() - started,
                "output": output[-6000:] if is_failure else _skips(output),
            }
        )  # fmt: skip


class Child:
    """A process, and all that it starts. What it says goes to files, since a full pipe would stop it."""

    def __init__(self, command: list[str], environment: dict[str, str] | None = None) -> None:
        self._files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115 - closed by `wait`
        self._process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **(environment or {})}, start_new_session=True,
            stdout=self._files[0], stderr=self._files[1],
        )  # fmt: skip
        self.output = self.complaints = ""
        """What it said, once it was waited for."""

    def wait(self, seconds: float) -> bool:
        """Whether it ended in time. Otherwise it is ended, with its children: they would hold the GPU."""
        try:
            self._process.wait(seconds)
            return True
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self.output, self.complaints = map(_read_and_close, self._files)

    @property
    def returncode(self) -> int:
        return self._process.returncode


def _read_and_close(file: IO[str]) -> str:
    with file:
        file.seek(0)
        return file.read()


def _skips(output: str) -> str:
    return "\n".join(line for line in output.splitlines() if line.startswith("SKIPPED"))


def run_others(report: Report, commands: Sequence[Command], budget: Budget, seconds: float) -> None:
    """What others do, each in processes of its own, which print a line of JSON for each figure."""
    for name, command in commands:
        left = min(seconds / len(commands), budget.left(REPORT_SECONDS))
        if left < 5:
            report.not_measured.append({"what": name, "reason": "out of time"})
            continue
        child = Child(command)
        if not child.wait(left):
            reason = f"not done in {left:.0f} s"
        elif child.returncode:
            reason = _last_line(child.complaints) or f"exit code {child.returncode}"
        else:
            reason = ""
        output = child.output
        for line in output.splitlines():
            if line.startswith("{"):
                _take(report, json.loads(line))
        if reason:
            report.not_measured.append({"what": name, "reason": reason})


def _take(report: Report, found: dict[str, Any]) -> None:
    (report.not_measured if "reason" in found else report.baselines).append(found)


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""


def run_cases(
    report: Report, device: Device, cases: Sequence[Case], budget: Budget, say: Callable[[str], object]
) -> None:
    """Measure in order while there is time. An error in one case leaves the others."""
    ranks: VirtualRanks | None = None
    slowest = 0.0
    for case in cases:
        # A case may take as long as the longest so far, and is not begun where that does not fit.
        if budget.left(REPORT_SECONDS) <= slowest:
            report.not_measured.append({"what": str(case), "reason": "out of time"})
            continue
        started = device.now()
        try:
            if ranks is None or ranks.world_size != case.world:
                ranks = None
                device.release()
                longest = max(each.nbytes for each in cases if each.world == case.world)
                ranks = device.make_ranks(case.world, longest, case.mode)
            row = measure(device, ranks, case)
            report.rows.append(row)
            say(f"{case}: {row.graph_us:.1f} us, {row.ratio_to_floor:.2f} x floor, host {row.host_us:.1f} us")
        except torch.OutOfMemoryError as error:
            report.not_measured.append({"what": str(case), "reason": str(error).split(". ")[0]})
            ranks = None
        except Exception as error:  # noqa: BLE001 - the others are still to be measured
            report.errors.append({"what": str(case), "reason": f"{type(error).__name__}: {error}"[:1000]})
            say(f"{case}: {type(error).__name__}: {error}")
            ranks = None
        slowest = max(slowest, device.now() - started)


def run_all(
    report: Report,
    device: Device,
    cases: Sequence[Case],
    budget: Budget,
    tests: Sequence[Command],
    others: Sequence[Command],
    say: Callable[[str], object] = print,
) -> None:
    """Everything, within the budget. What the machine is comes with the report."""
    say(f"{len(cases)} cases in {budget.seconds:.0f} s")
    if tests:
        run_tests(report, tests, TESTS_SHARE * budget.seconds, device.now)
        for test in report.tests:
            say(f"tests, {test['name']}: {test['result']}")
    if others:
        run_others(report, others, budget, OTHERS_SHARE * budget.seconds)
    run_cases(report, device, cases, budget, say)
    report.seconds = budget.spent
