import json
import pathlib

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from perf import compare

ROOT = pathlib.Path(__file__).parents[2]
COMMAND = typer.Typer()
COMMAND.command()(compare.main)


def _entry(impl, microseconds, blocks=4, calls=10, op="all_reduce", noise=0.02, seed=0):
    random = np.random.default_rng([seed, len(impl)])
    seconds = microseconds * 1e-6 * random.normal(1.0, noise, blocks * calls).clip(0.5)
    info = {
        "op": op, "nbytes": 1024, "ranks": 2, "out": "reused", "dtype": "float32", "impl": impl,
        "affinity": "one core a rank", "blocks": blocks,
    }  # fmt: skip
    return {"extra_info": info, "stats": {"data": seconds.tolist(), "rounds": len(seconds)}}


def _run(path, **microseconds):
    path.write_text(json.dumps({"benchmarks": [_entry(name, us) for name, us in microseconds.items()]}))
    return str(path)


def _compare(*args):
    return CliRunner().invoke(COMMAND, [str(arg) for arg in args])


@pytest.fixture
def old(tmp_path):
    return _run(tmp_path / "old.json", tcomm=10.0, gloo=400.0)


@pytest.mark.parametrize(
    ("tcomm", "gloo", "verdict", "code"),
    [
        (10.1, 400.0, "same", 0),
        (15.0, 400.0, "slower", 1),
        (11.0, 400.0, "slower", 0),
        (5.0, 400.0, "faster", 0),
        # All of the machine is slower: that is not tcomm's doing.
        (20.0, 800.0, "same", 0),
        (10.0, 200.0, "slower", 1),
    ],
)
def test_a_case_is_judged_by_its_share_of_the_baseline(tmp_path, old, tcomm, gloo, verdict, code):
    new = _run(tmp_path / "new.json", tcomm=tcomm, gloo=gloo)
    result = _compare(old, new, "--fail-above", "1.2")
    assert verdict in result.stdout.split()
    assert result.exit_code == code, result.output
    assert ("slower than it was, relative to gloo" in result.stderr) is (code == 1)
    assert _compare(old, new).exit_code == 0


def test_a_slow_block_is_no_change():
    def case(slow_blocks):
        ours = np.full((5, 10), 1e-5)
        ours[:slow_blocks] *= 3
        return {"tcomm": ours, "gloo": np.full((5, 10), 4e-4)}

    key = ("all_reduce", 1024, 2, "reused", "float32")
    (unsure,) = compare.compare({key: case(1)}, {key: case(3)}, "gloo")
    assert unsure.change == pytest.approx(3)
    assert unsure.word == "same"
    (sure,) = compare.compare({key: case(0)}, {key: case(5)}, "gloo")
    assert sure.word == "slower"


def test_the_interval_holds_the_share():
    entry = {"tcomm": np.linspace(8e-6, 12e-6, 40).reshape(4, 10), "gloo": np.full((4, 10), 1e-4)}
    share = compare.share_of(entry, "gloo")
    assert share.value == pytest.approx(0.1)
    assert 0.08 <= share.low < share.value < share.high <= 0.12
    assert compare.share_of(entry, "mpi") is None


def test_cases_of_one_run_only_are_named_and_one_without_a_baseline_is_not_judged(tmp_path, old):
    new = tmp_path / "new.json"
    entries = [_entry("tcomm", 10.0), _entry("tcomm", 5.0, op="reduce"), _entry("gloo", 5.0, op="reduce")]
    new.write_text(json.dumps({"benchmarks": entries}))
    result = _compare(old, new)
    assert result.exit_code == 0
    assert "no baseline" in result.stdout
    assert f"only in {new}: reduce-1024-2-reused-float32" in result.stdout.replace("\n", "")
    failed = _compare(old, new, "--fail-above", "1.2")
    assert failed.exit_code == 2
    assert failed.stderr == "compare: no case can be judged: no run of both has gloo\n"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "No such file or directory"),
        ("{", "is not a run of `make bench`: Input data was truncated"),
        ("[1]", "is not a run of `make bench`: Expected `object`, got `array`"),
        ('{"benchmarks": [{"stats": {"data": [1.0]}, "extra_info": {}}]}', "missing required field `op`"),
        (json.dumps({"benchmarks": []}), "tcomm was not measured in this run"),
        (json.dumps({"benchmarks": [_entry("gloo", 1.0)]}), "tcomm was not measured in this run"),
        (
            json.dumps({"benchmarks": [_entry("tcomm", 1.0) | {"stats": {"data": [1.0] * 7}}]}),
            "all_reduce has no blocks of calls",
        ),
    ],
)
def test_what_is_no_run_is_refused_in_a_sentence(tmp_path, old, content, told):
    path = tmp_path / "odd.json"
    if content is not None:
        path.write_text(content)
    for files in ((old, path), (path, old)):
        result = _compare(*files)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"compare: {path}")
        assert told in result.stderr
        assert "Traceback" not in result.output


def test_runs_with_nothing_in_common_are_refused(tmp_path, old):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"benchmarks": [_entry("tcomm", 1.0, op="reduce")]}))
    result = _compare(old, path)
    assert result.exit_code == 2
    assert "have no case in common" in result.stderr


def test_it_is_a_script(programs, old):
    done = programs.run(ROOT / "perf/compare.py", old, old, "--fail-above", "1.2")
    assert done.returncode == 0, done.stderr
    assert "same" in done.stdout
