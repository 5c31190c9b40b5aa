import json
import time

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tcomm.cli import overhead_bench
from tcomm.cli.app import app
from tcomm.groups.parallel import tensor_verbs
from tcomm.groups.parallel.state import current
from tcomm.tuning.measure import Schedule

NAMES = ["Communicator.all_reduce", "tensor_model_parallel_all_reduce", "difference"]
FEW = Schedule(blocks=3, calls=3, warmups=1)


def test_both_calls_are_timed_and_the_difference_is_theirs(monkeypatch):
    # Seconds of a sample, a hundred calls; three samples in each of three blocks.
    bare = np.array([1, 2, 9, 2, 2, 2, 4, 3, 2]) * 1e-4
    layered = np.array([4, 3, 3, 9, 2, 8, 3, 4, 1]) * 1e-4
    monkeypatch.setattr(
        overhead_bench,
        "time_alternating",
        lambda calls, *_: (dict(zip(calls, (bare, layered), strict=True)), {}),
    )
    found = overhead_bench.measure_overhead(FEW)
    assert list(found) == NAMES
    medians = [found[name].median_us for name in NAMES]
    # The blocks' medians are 2, 2, 3 of the bare call and 3, 8, 3 of the layered one.
    assert medians == pytest.approx([2, 3, 1])
    assert found["difference"].p90_us > 4


def test_the_calls_are_timed_with_a_clock_and_leave_nothing_behind():
    before = current()
    found = overhead_bench.measure_overhead(FEW)
    assert list(found) == NAMES
    assert all(found[name].median_us > 0 for name in NAMES[:2])
    assert current() is before


def test_what_the_group_layer_adds_is_seen(monkeypatch):
    out_place = tensor_verbs.TensorVerbs._all_reduce_out_place

    def slow(self, x):
        time.sleep(2e-4)
        return out_place(self, x)

    monkeypatch.setattr(tensor_verbs.TensorVerbs, "_all_reduce_out_place", slow)
    assert overhead_bench.measure_overhead(FEW)["difference"].median_us > 200


def test_nothing_is_moved_and_a_new_tensor_comes_out():
    with overhead_bench._idle_group() as communicator:
        x = torch.full((4,), 7.0)
        for call in (communicator.all_reduce, overhead_bench.tensor_model_parallel_all_reduce):
            out = call(x)
            assert out.shape == x.shape
            assert out.data_ptr() != x.data_ptr()
        assert len(communicator._plans) == 1


def test_the_command_prints_and_writes_a_row_for_each(tmp_path):
    path = tmp_path / "rows.json"
    result = CliRunner().invoke(
        app, ["bench", "call_overhead", "--blocks", "2", "--calls", "2", "--json", str(path)]
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())
    assert [row["call"] for row in rows] == NAMES
    for row in rows:
        assert row["p10_us"] <= row["median_us"] <= row["p90_us"]
        assert f"{row['median_us']:.2f}" in result.output
