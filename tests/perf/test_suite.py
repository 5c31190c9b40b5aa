import json
import os
import pathlib

import pytest

from perf import cases
from perf.cases import Bench, Key, keys
from perf.test_collectives import Replay
from tcomm.cli.bench import Measurement
from tcomm.cli.cases import VERBS
from tcomm.cli.workers import why_no_mpi
from tcomm.errors import TcommError

ROOT = pathlib.Path(__file__).parents[2]
ALL_REDUCE = Key("all_reduce", 1024, 2, "reused")


def _measurement(key, wrong=0):
    return Measurement(
        key.op, "-", key.ranks, "float32", "sum", key.nbytes, key.out, "", {"tcomm": [1.0]}, {"tcomm": wrong}
    )


class FakeRanks:
    started = 0

    def __init__(self, world_size, **settings):
        FakeRanks.started += 1
        self.world_size = world_size
        self.wrong = 0

    def run(self, fn, request, timeout):
        return vars(
            _measurement(Key(request.op, request.sizes[0], request.ranks, request.outs[0]), self.wrong)
        )

    def close(self):
        pass


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(cases, "Ranks", FakeRanks)
    monkeypatch.setattr(FakeRanks, "started", 0)
    return Bench(2, 3)


def test_every_verb_is_measured_at_every_size_and_a_barrier_once():
    made = keys("1KiB,1MiB", "2,4", "reused")
    assert len(made) == len(set(made)) == 2 * (2 * (len(VERBS) - 1) + 1)
    assert {key.op for key in made} == set(VERBS)
    assert Key("barrier", 0, 4, "none").id == "barrier-0B-4ranks"
    assert [key.ranks for key in made] == sorted(key.ranks for key in made)


def test_a_case_is_measured_once_and_a_world_started_once(bench):
    for nbytes in (1024, 4096):
        first = bench.of(Key("all_reduce", nbytes, 2, "reused"))
        assert bench.of(Key("all_reduce", nbytes, 2, "reused")) is first
    assert FakeRanks.started == 1
    bench.of(Key("all_reduce", 1024, 4, "reused"))
    assert FakeRanks.started == 2


def test_wrong_results_are_no_benchmark(bench, monkeypatch):
    monkeypatch.setattr(FakeRanks, "run", lambda *args, **kwargs: vars(_measurement(ALL_REDUCE, wrong=3)))
    for _ in range(2):
        with pytest.raises(TcommError, match="all_reduce-1KiB-2ranks: wrong elements"):
            bench.of(ALL_REDUCE)


def test_the_replayed_clock_shows_the_measured_durations_to_the_last_bit():
    clock = Replay()
    for seconds in (0.1, 3e-6, 7.7e-5):
        clock.rewind()
        start = clock()
        clock.advance(seconds)
        assert clock() - start == seconds


def _suite(programs, *args, **settings):
    command = ["-m", "pytest", "-p", "no:cacheprovider", "perf", "--benchmark-quiet", *args]
    return programs.run(*command, cwd=ROOT, **settings)


def test_without_mpi_its_tests_are_skipped_with_the_reason_and_the_others_run(programs, tmp_path):
    settings = dict(os.environ, PATH=str(tmp_path))
    done = _suite(programs, "-k", "barrier", "--worlds", "2", "--blocks", "1", "--calls", "2", env=settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed, 1 skipped" in done.stdout
    assert "no MPI: there is no mpirun on the PATH" in done.stdout
    assert "MPI skipped: there is no mpirun on the PATH" in done.stdout


def test_one_run_gives_all_contenders_one_table_and_one_file(programs, tmp_path):
    path = tmp_path / "bench.json"
    done = _suite(
        programs, f"--benchmark-json={path}", "-k", "all_reduce or barrier", "--sizes", "1KiB",
        "--worlds", "2", "--blocks", "2", "--calls", "3",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    impls = ["tcomm", "gloo"] if why_no_mpi() else ["tcomm", "gloo", "mpi"]
    entries = json.loads(path.read_text())["benchmarks"]
    assert [(entry["extra_info"]["op"], entry["extra_info"]["impl"]) for entry in entries] == [
        (op, impl) for op in ("all_reduce", "barrier") for impl in impls
    ]
    for entry in entries:
        info, stats = entry["extra_info"], entry["stats"]
        assert stats["rounds"] == len(stats["data"]) == 6
        assert stats["median"] * 1e6 == pytest.approx(info["median_us"])
        assert info["p10_us"] <= info["median_us"] <= info["p90_us"]
    assert entries[1]["extra_info"]["ratio"] == 1.0
    assert done.stdout.count("gloo/tcomm") == 1
    compared = programs.run("perf/compare.py", path, path, "--fail-above", "1.01", cwd=ROOT)
    assert compared.returncode == 0, compared.stderr
    assert [line.split()[-1] for line in compared.stdout.splitlines()[2:4]] == ["same", "same"]
