import json
import re

import pytest
from typer.testing import CliRunner

from tcomm.cli import app as app_module
from tcomm.cli.app import app
from tcomm.cli.bench import BenchRequest, check_request, parse_outs, parse_sizes
from tcomm.cli.workers import why_no_mpi
from tcomm.errors import ConfigError

runner = CliRunner()


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("1KiB", (1024,)), ("16KiB,1MiB", (16384, 1048576)), ("100", (100,)), (" 2 G ", (2 << 30,))],
)
def test_sizes_are_bytes(text, sizes):
    assert parse_sizes(text) == sizes


@pytest.mark.parametrize("text", ["", "KiB", "1XB", "-1", "1,,2"])
def test_a_size_that_makes_no_sense_is_refused(text):
    with pytest.raises(ConfigError, match="is not a size"):
        parse_sizes(text)


def test_kinds_of_results_are_those_that_the_verb_has():
    assert parse_outs("all_reduce", "all") == ("reused", "allocated", "symmetric", "in_place")
    assert parse_outs("all_gather", "all") == parse_outs("all_reduce", "both") == ("reused", "allocated")
    assert parse_outs("all_reduce", "in_place") == ("in_place",)
    with pytest.raises(
        ConfigError, match="--out 'new' is none of reused, allocated, symmetric, in_place, both"
    ):
        parse_outs("all_reduce", "new")
    with pytest.raises(ConfigError, match="only all_reduce writes straight to symmetric tensors"):
        check_request(BenchRequest("all_gather", 2, (1024,), outs=parse_outs("all_gather", "symmetric")))


def test_demo_says_ok_and_counts_launches(forked_ranks):
    done = runner.invoke(app, ["demo", "--ranks", "2"])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == "ok"
    assert re.search(r"launched +\d+ x _two_shot_all_reduce_kernel", done.stdout)


def test_bench_writes_the_rows_that_it_prints(forked_ranks, tmp_path):
    path = tmp_path / "rows.json"
    command = [
        "bench", "all_reduce", "--ranks", "2", "--sizes", "1KiB,16KiB", "--blocks", "2", "--calls", "3",
        "--json", str(path),
    ]  # fmt: skip
    done = runner.invoke(app, command)
    assert done.exit_code == 0, done.output
    rows = json.loads(path.read_text())
    assert [(row["nbytes"], row["out"]) for row in rows] == [
        (nbytes, out) for nbytes in (1024, 16384) for out in ("reused", "allocated", "symmetric", "in_place")
    ]  # fmt: skip
    for row in rows:
        assert row["checked"]
        assert row["wrong"] == 0
        assert row["p10_us"] <= row["median_us"] <= row["p90_us"]
        assert row["ratio"] == pytest.approx(row["baseline_us"] / row["median_us"])
        assert row["busbw_gbps"] == pytest.approx(row["nbytes"] / row["median_us"] / 1e3)
        assert f"{row['median_us']:.1f}" in done.stdout


def test_an_error_is_a_sentence_and_not_a_traceback(programs):
    done = programs.run("-m", "tcomm", "bench", "all_reduce", "--sizes", "1KiB", "--against", "smoke signals")
    assert done.returncode == 1
    assert done.stderr == "tcomm: ConfigError: 'smoke signals' is not a baseline; give gloo or mpi\n"


@pytest.mark.skipif(bool(why_no_mpi()), reason=why_no_mpi() or "there is MPI")
def test_bench_has_a_row_for_each_baseline(tmp_path):
    path = tmp_path / "rows.json"
    command = [
        "bench", "barrier", "--ranks", "2", "--blocks", "1", "--calls", "3", "--against", "gloo,mpi",
        "--json", str(path),
    ]  # fmt: skip
    done = runner.invoke(app, command)
    assert done.exit_code == 0, done.output
    rows = json.loads(path.read_text())
    assert [(row["baseline"], row["nbytes"], row["out"]) for row in rows] == [
        ("gloo", 0, "none"), ("mpi", 0, "none"),
    ]  # fmt: skip
    assert rows[0]["median_us"] == rows[1]["median_us"]


def test_bench_skips_mpi_aloud_where_there_is_none_and_something_else_is_left(monkeypatch, capsys):
    monkeypatch.setattr(app_module, "why_no_mpi", lambda: "no such thing")
    assert app_module._baselines("mpi,gloo") == ("gloo",)
    assert capsys.readouterr().err == "mpi skipped: no such thing\n"
    assert app_module._baselines("mpi") == ("mpi",)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"op": "all_rejoice"}, "'all_rejoice' cannot be measured; give one of all_reduce, all_gather"),
        ({"reduce": "product"}, "'product' cannot be measured; give one of sum, avg, max, min"),
        ({"dtype": "tensor"}, "'tensor' is no dtype"),
        ({"dtype": "nonsense"}, "'nonsense' is no dtype"),
        ({"against": ("mpi",), "dtype": "bfloat16"}, "MPI has no bfloat16 to reduce"),
        ({"op": "barrier", "algorithm": "triton"}, "barrier has no algorithms"),
        ({"op": "gather", "sizes": (4,)}, "gather of 4 bytes: not a multiple of 8 bytes"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(changes, told):
    given = {"op": "all_reduce", "ranks": 2, "sizes": (1024,)} | changes
    with pytest.raises(ConfigError, match=told):
        check_request(BenchRequest(**given))


def test_bench_counts_wrong_results(forked_ranks, monkeypatch):
    from tcomm.cli import bench
    from tcomm.tuning.measure import Schedule
    from tests.cli.broken import broken_measure

    monkeypatch.setattr(bench, "_measure_all", broken_measure)
    request = bench.BenchRequest("all_reduce", 2, (1024,), schedule=Schedule(1, 2, 1), outs=("reused",))
    rows = bench.run_bench(request, 60.0)
    assert rows[0]["wrong"] > 0
    assert not rows[0]["checked"]


def test_explain_names_every_algorithm():
    result = runner.invoke(app, ["explain", "all_reduce", "--nbytes", "1KiB,64MiB", "--ranks", "4"])
    assert result.exit_code == 0
    assert result.output.count("triton:one_shot_ll") == 2
    assert "because the table says so" in result.output


def test_env_lists_what_is_set(monkeypatch):
    monkeypatch.setenv("TCOMM_ALGORITHM", "two_shot")
    result = runner.invoke(app, ["env"])
    assert re.search(r"TCOMM_ALGORITHM +two_shot +set", result.output)
    assert re.search(r"TCOMM_TIMEOUT +default +default", result.output)
