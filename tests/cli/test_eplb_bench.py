import dataclasses
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from tcomm.cli import app as app_module
from tcomm.cli import eplb_bench
from tcomm.cli.app import app
from tcomm.cli.eplb_bench import (
    DRIFT_CASES,
    DRIFT_HEADER,
    EPLB_BENCH_HEADER,
    EPLB_CASES,
    EplbCase,
    drift_columns,
    eplb_bench_columns,
    eplb_loads,
    measure_case,
    measure_drift,
    run_eplb_bench,
)
from tcomm.eplb import Shape

SMALL = EplbCase(6, Shape(32, 40, 4, 2, 8), "zipf1.2", target=0.5)


def test_loads_are_the_same_each_time_and_skewed_as_their_name_says():
    case = EPLB_CASES[0]
    load = eplb_loads(case)
    assert load.shape == (58, 256)
    np.testing.assert_array_equal(load, eplb_loads(case))
    falling = -np.sort(-load, axis=1)
    ratio = np.median(falling[:, 0] / falling[:, 9])
    assert 10**1.2 * 0.7 < ratio < 10**1.2 * 1.5
    flatter = -np.sort(-eplb_loads(dataclasses.replace(case, load="zipf0.8")), axis=1)
    assert np.median(flatter[:, 0] / flatter[:, 9]) < ratio
    assert np.log(eplb_loads(dataclasses.replace(case, load="lognormal")) / 1e6).std() == pytest.approx(
        1, abs=0.02
    )


def test_the_known_figures_of_the_plain_plan_come_out():
    row = measure_case(EPLB_CASES[0], rounds=1)
    assert row["case"] == "58/256/288 on 32, 4 nodes"
    assert row["plan_balancedness"] == pytest.approx(0.508, abs=5e-4)
    assert row["balancedness"] >= row["target"] == 0.508
    assert row["balancedness"] < row["split_balancedness"] <= row["bound"]
    assert row["checked"]
    assert row["even_enough"]
    assert row["plan_ratio"] == pytest.approx(row["reference_ms"] / row["plan_ms"])
    assert row["plan_ratio"] > 2


def test_a_plan_that_is_not_the_reference_s_is_seen(monkeypatch):
    assert measure_case(SMALL, 1)["checked"]
    plain = eplb_bench.reference_maps
    monkeypatch.setattr(eplb_bench, "reference_maps", lambda *a: tuple(part[:, ::-1] for part in plain(*a)))
    row = measure_case(dataclasses.replace(SMALL, target=1.1), 1)
    assert not row["checked"]
    assert not row["even_enough"]
    assert eplb_bench_columns([row])[0][-3:] == ["yes", "NO", "NO"]


@pytest.mark.parametrize("case", DRIFT_CASES, ids=lambda case: f"{case.load} {case.drift}")
def test_a_near_plan_is_almost_as_even_as_a_full_one_and_moves_a_quarter(case):
    row = measure_drift(case)
    assert row["near"] >= row["full"] - 0.005
    assert row["near_moved"] <= 0.25 < row["full_moved"]
    assert row["kept"] < row["near"]
    assert row["checked"]


def test_cases_are_those_that_are_promised():
    targets = [case.target for case in EPLB_CASES if case.target]
    assert targets == [0.508, 0.867, 0.937, 0.991, 0.9997, 0.9995, 0.906, 0.998, 0.997, 0.9998]
    assert [case.drift for case in DRIFT_CASES] == [0.1, 0.1, 0.1, 0.3, 0.1]
    assert {case.name for case in EPLB_CASES} == {
        "58/256/288 on 32, 4 nodes", "58/256/288 on 32, global", "61/256/320 on 64, global",
        "48/128/160 on 16, global",
    }  # fmt: skip


def test_the_command_prints_and_writes_a_row_for_each_case(tmp_path, monkeypatch):
    monkeypatch.setattr(eplb_bench, "EPLB_CASES", (SMALL,))
    monkeypatch.setattr(eplb_bench, "DRIFT_CASES", (dataclasses.replace(SMALL, drift=0.1),))
    path = tmp_path / "rows.json"
    result = CliRunner().invoke(app, ["bench", "eplb", "--json", str(path)])
    rows = json.loads(path.read_text())
    assert [row["op"] for row in rows] == ["eplb", "eplb_drift"]
    (plan,), (drift,) = eplb_bench_columns(rows), drift_columns(rows)
    assert len(plan) == len(EPLB_BENCH_HEADER)
    assert len(drift) == len(DRIFT_HEADER)
    for text in plan + drift:
        assert text in result.output
    assert (result.exit_code == 0) == all(row["checked"] for row in rows)


def test_a_row_that_is_wrong_fails_the_command(monkeypatch):
    monkeypatch.setattr(eplb_bench, "EPLB_CASES", (SMALL,))
    monkeypatch.setattr(eplb_bench, "DRIFT_CASES", ())
    rows = [row | {"checked": False} for row in run_eplb_bench(1)]
    monkeypatch.setattr(app_module, "run_eplb_bench", lambda: rows)
    result = CliRunner().invoke(app, ["bench", "eplb"])
    assert result.exit_code == 1
    assert "differ from the reference's" in str(result.exception)
