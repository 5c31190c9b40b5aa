"""`python -m perf.gpu` with another device: interpreted kernels, and a clock that a test winds."""

import json
import os
import pathlib
import random
import subprocess
import sys
import time

import pytest
import torch

from perf.gpu import __main__ as command
from perf.gpu import measure as measuring
from perf.gpu import plan, report, suite
from perf.gpu.machine import ROOT, describe
from perf.gpu.plan import Budget, Case, make_plan, size_name
from tcomm import VirtualRanks


class FakeDevice:
    """The CPU, where each thing that is timed takes as long as a test says."""

    device = torch.device("cpu")
    copy_nbytes = 1 << 12
    flush_l2 = False

    def __init__(self, seconds=1e-3, step=1e-6):
        self._seconds, self._step, self._time = seconds, step, 0.0
        self._random = random.Random(0)
        self.made = []

    def now(self):
        self._time += self._step
        return self._time

    def make_ranks(self, world, max_nbytes, mode):
        self.made.append((world, max_nbytes, mode))
        ranks = VirtualRanks(world, "cpu", mode=mode, staging_bytes=1 << 16, timeout=20.0)
        ranks.prepare(max_nbytes)
        return ranks

    def capture(self, run, calls):
        return run

    def seconds(self, run):
        run()
        self._time += self._seconds
        return self._seconds * self._random.uniform(0.9, 1.1)

    def synchronise(self):
        pass

    def release(self):
        pass


@pytest.fixture(autouse=True)
def few_calls(monkeypatch):
    monkeypatch.setattr(
        measuring, "choose_counts", lambda *_: (1, 1, measuring.Schedule(blocks=2, calls=1, warmups=1))
    )


def new_report():
    return report.Report({"gpu": "Fake GPU", "commit": "abc"}, "python -m perf.gpu", "2026-01-02 0304")


@pytest.mark.parametrize("op", plan.ALGORITHMS)
def test_every_algorithm_is_measured_and_checked(op):
    device = FakeDevice()
    for algorithm in plan.ALGORITHMS[op]:
        ranks = device.make_ranks(2, 256, "grid")
        row = measuring.measure(device, ranks, Case(op, algorithm, 2, 256))
        assert (row.wrong, row.checked, row.replays, row.nbytes, row.dtype) == (0, 8, 2, 256, "bfloat16")
        assert 900 <= row.graph_us_p10 <= row.graph_us <= row.graph_us_p90 <= 1100
        assert row.ratio_to_floor == pytest.approx(row.graph_us / row.floor_us)
        assert row.floor_us == pytest.approx(row.bytes_moved / row.copy_gbps / 1e3)
        assert row.host_us == pytest.approx(1.0)


def test_a_wrong_result_is_a_failure_of_the_run(monkeypatch, tmp_path):
    right = VirtualRanks.all_reduce

    def wrong(self, x, *args, **kwargs):
        out = right(self, x, *args, **kwargs)
        if kwargs.get("out") is not None:
            out[-1, -1] = 77.0
        return out

    monkeypatch.setattr(VirtualRanks, "all_reduce", wrong)
    found = new_report()
    suite.run_cases(
        found, FakeDevice(), [Case("all_reduce", "two_shot", 2, 256)], Budget(9e9, lambda: 0.0), print
    )
    assert found.rows[0].wrong == 8
    assert found.problems == ["wrong: all_reduce two_shot 256 B of 2"]
    assert "WRONG: 8 elements" in report.markdown(found)


def test_a_call_that_writes_nothing_is_wrong(monkeypatch):
    device = FakeDevice()
    subject = measuring.Subject(device.make_ranks(2, 256, "grid"), Case("all_gather", "push", 2, 256))
    subject.refill()
    subject.run()
    assert subject.count_wrong() == 0
    subject.refill()
    assert subject.count_wrong() > 0


def test_what_does_not_fit_the_time_is_said():
    device = FakeDevice()
    cases = [Case("all_gather", "push", 2, 256 << power) for power in range(4)]
    found, budget = new_report(), Budget(suite.REPORT_SECONDS + 0.03, device.now)
    suite.run_cases(found, device, cases, budget, print)
    assert 0 < len(found.rows) < 4
    assert len(found.rows) + len(found.not_measured) == 4
    assert {each["reason"] for each in found.not_measured} == {"out of time"}
    assert str(cases[-1]) in report.markdown(found)
    assert budget.spent < budget.seconds
    assert found.problems == []


def test_an_error_of_one_case_leaves_the_others():
    device = FakeDevice()
    cases = [
        Case("all_gather", "push", 2, 256),
        Case("all_reduce", "one_shot_ll", 2, 256, torch.float64),
        Case("all_gather", "pull", 2, 256),
    ]
    found = new_report()
    suite.run_cases(found, device, cases, Budget(9e9, device.now), print)
    assert [row.algorithm for row in found.rows] == ["push", "pull"]
    assert "a lane carries 32 bits" in found.errors[0]["reason"]
    assert len(found.problems) == 1
    # The ranks of an error may be out of step: others are made.
    assert len(device.made) == 2


def test_too_little_memory_is_no_error(monkeypatch):
    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(FakeDevice, "make_ranks", refuse)
    found = new_report()
    suite.run_cases(
        found, FakeDevice(), [Case("all_reduce", "two_shot", 2, 256)], Budget(9e9, lambda: 0.0), print
    )
    assert found.not_measured[0]["reason"] == "CUDA out of memory"
    assert found.problems == []


def python(code):
    return [sys.executable, "-c", code]


def test_tests_run_side_by_side_and_are_killed_in_time():
    found, device = new_report(), FakeDevice(step=0.0)
    commands = [
        ("good", python("print('SKIPPED [1] because'); print('3 passed')")),
        ("bad", python("print('1 failed'); raise SystemExit(1)")),
        ("none", python("print('no tests ran'); raise SystemExit(5)")),
        ("late", python("import time; time.sleep(60)")),
    ]
    suite.run_tests(found, commands, 1.0, device.now)
    assert [(test["name"], test["result"], test["is_failure"]) for test in found.tests] == [
        ("good", "3 passed", False),
        ("bad", "1 failed", True),
        ("none", "no tests ran", False),
        ("late", "not done in 1 s; killed", True),
    ]
    assert found.tests[0]["output"] == "SKIPPED [1] because"
    assert found.problems == ["tests bad: 1 failed", "tests late: not done in 1 s; killed"]


def test_who_is_killed_takes_his_children_along(tmp_path):
    grandchild = "import time; time.sleep(50)"
    code = (
        "import subprocess, sys\n"
        f"p = subprocess.Popen([sys.executable, '-c', {grandchild!r}])\n"
        "print(p.pid, flush=True)\n"
        "p.wait()\n"
    )
    child = suite.Child(python(code))
    assert not child.wait(1.5)
    pid = int(child.output)
    with pytest.raises(ProcessLookupError):
        wait_until_gone(pid)


def wait_until_gone(pid):
    for _ in range(100):
        os.kill(pid, 0)
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            raise ProcessLookupError
        time.sleep(0.05)


def test_what_others_do_or_why_not_is_taken_over():
    figure = {
        "what": "nccl",
        "world": 2,
        "nbytes": 1024,
        "graph_us": None,
        "eager_us": 3.0,
        "note": "no graph",
    }
    commands = [
        ("nccl", python(f"import json; print('hello'); print(json.dumps({figure!r}))")),
        ("one", python('print(\'{"what": "one", "reason": "1 ranks: it said no"}\')')),
        ("broken", python("raise ValueError('of torch')")),
    ]
    found = new_report()
    suite.run_others(found, commands, Budget(100.0, lambda: 0.0), 60.0)
    assert found.baselines == [figure]
    assert [each["reason"] for each in found.not_measured] == ["1 ranks: it said no", "ValueError: of torch"]
    assert "| nccl | 2     | 1 KiB | -        | 3.0      | no graph |" in report.markdown(found)


def test_the_whole_command_writes_json_and_a_table(tmp_path, capsys):
    options = command.parse(
        [
            "--out",
            str(tmp_path),
            "--worlds",
            "2",
            "--sizes",
            "256",
            "--ops",
            "all_reduce",
            "--budget",
            "90",
            "--no-others",
        ]
    )
    tests = [("nothing", python("print('1 passed')"))]
    assert command.run(options, FakeDevice(), tests) == 0
    (written,) = tmp_path.rglob("*.json")
    found = json.loads(written.read_text())
    assert len(found["rows"]) == 4 * 2
    assert {row["dtype"] for row in found["rows"]} == {"bfloat16", "float32"}
    assert found["machine"]["torch"] == torch.__version__
    assert found["errors"] == found["not_measured"] == []
    table = written.with_suffix(".md").read_text()
    assert table in capsys.readouterr().out
    assert table.count("| two_shot ") == 2


def test_the_run_ends_in_its_time_and_fails_where_tests_fail(tmp_path):
    options = command.parse(
        ["--out", str(tmp_path), "--worlds", "2", "--sizes", "256", "--budget", "10.1", "--no-others"]
    )
    assert command.run(options, FakeDevice(), [("bad", python("raise SystemExit(1)"))]) == 1
    (written,) = tmp_path.rglob("*.json")
    found = json.loads(written.read_text())
    assert found["tests"][0]["result"] == "exit code 1 and no word"
    assert len(found["rows"]) < 20
    assert len(found["rows"]) + len(found["not_measured"]) == 20


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(programs):
    done = programs.run("-m", "perf.gpu", cwd=ROOT)
    assert done.returncode == 2
    assert done.stdout == ""
    assert (
        done.stderr
        == f"perf.gpu: there is no CUDA device for torch {torch.__version__}; nothing was measured\n"
    )
    done = programs.run("-m", "perf.gpu.peers", "--impl", "nccl", "--world", "2", cwd=ROOT)
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"what": "nccl", "reason": "there is no CUDA device"}


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(command, "NEEDED", ("torch", "msgspec_of_another_name"))
    assert command.why_not() == (
        "perf.gpu: msgspec_of_another_name cannot be imported; run: pip install -e ."
    )


def test_needed_is_all_that_tcomm_imports():
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('rich', 'typer', 'matplotlib', 'pytest', 'mpi4py', 'pynvml'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import tcomm, perf.gpu.__main__, perf.gpu.device, perf.gpu.suite, perf.gpu.machine\n"
        "print(perf.gpu.machine.describe()['torch'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == torch.__version__, done.stderr


def test_the_plan_has_every_algorithm_at_every_size():
    cases = make_plan()
    assert len(cases) == len(set(cases)) == 3 * 10 * (9 + 1)
    assert [size_name(size) for size in plan.SIZES] == [
        "1 KiB", "4 KiB", "16 KiB", "64 KiB", "256 KiB", "1 MiB", "4 MiB", "16 MiB", "64 MiB",
    ]  # fmt: skip
    first = cases[: len(plan.SIZES) * 4]
    assert {(case.world, case.op) for case in first} == {(8, "all_reduce")}
    for test in suite.test_commands():
        assert any((ROOT / part).is_file() for part in test[1]), test


def test_bytes_moved_are_counted():
    moved = {a: Case("all_reduce", a, 2, 100).bytes_moved for a in plan.ALGORITHMS["all_reduce"]}
    # Two ranks of S = 100: 2 (2 S + 4 W S), 2 (2 S + 2 W S), 2 (3 S + W S), 2 (5 S + S / W).
    assert moved == {"one_shot_ll": 2000, "one_shot_push": 1200, "one_shot_pull": 1000, "two_shot": 1100}
    assert Case("all_gather", "pull", 4, 400).bytes_moved == 4 * (800 + 200)
    assert Case("all_gather", "pull", 4, 400).input_numel == 50


def test_the_machine_is_described_without_a_gpu():
    found = describe()
    assert found["commit"] != "unknown"
    assert "driver" in found
