import importlib.util
import sys
import types

import numpy as np
import pytest
from typer.testing import CliRunner

from tcomm.cli import eplb
from tcomm.cli.app import app
from tcomm.cli.eplb import EPLB_HEADER, EplbRequest, eplb_columns, plot_loads, run_eplb
from tcomm.eplb import Shape, balancedness, initial_map, make_plan
from tcomm.errors import CapabilityError, ConfigError

SHAPE = Shape(32, 40, 4, 2, 8)
LOAD = np.random.default_rng(0).lognormal(0, 1, (3, 32))
NUMBERS = ["--replicas", "40", "--gpus", "8", "--nodes", "2", "--groups", "4"]


@pytest.fixture
def files(tmp_path):
    np.save(tmp_path / "loads.npy", LOAD)
    np.save(tmp_path / "map.npy", make_plan(LOAD[::-1], SHAPE).phy2log)
    return tmp_path


def _request(files, **more):
    return EplbRequest(files / "loads.npy", 40, 8, 2, 4, **more)


def test_the_command_plans_and_says_what_it_brings(files):
    out = files / "new.npy"
    result = CliRunner().invoke(app, ["eplb", str(files / "loads.npy"), *NUMBERS, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "search: hierarchical: each of 4 groups is on one of 2 nodes" in result.output
    plan = make_plan(LOAD, SHAPE)
    np.testing.assert_array_equal(np.load(out), plan.phy2log)
    before = np.tile(initial_map(SHAPE), (3, 1))
    for value in (balancedness(before, LOAD, 8).mean(), plan.balancedness.mean(), plan.bound.mean()):
        assert f"{value:.4f}" in result.output


def test_a_current_map_and_a_budget_make_it_a_replan(files):
    found = run_eplb(_request(files, current=files / "map.npy", max_moves=3))
    assert found.plan.policy == "incremental"
    assert 0 < found.plan.diff(found.before).num_copies <= 9
    np.testing.assert_array_equal(found.before, np.load(files / "map.npy"))
    full = run_eplb(_request(files, current=files / "map.npy", policy="default"))
    assert full.plan.policy == "default"
    assert full.plan.diff(full.before).num_copies > 9


def test_rows_are_the_map_before_and_after(files):
    found = run_eplb(_request(files, current=files / "map.npy", max_moves=3))
    before, after = eplb_columns(found)
    assert len(before) == len(after) == len(EPLB_HEADER)
    old = balancedness(found.before, LOAD, 8)
    assert before[:4] == ["before", f"{old.mean():.4f}", f"{old.min():.4f}", f"{found.plan.bound.mean():.4f}"]
    moves = found.plan.diff(found.before)
    assert after[4:7] == [str(moves.num_copies), f"{moves.num_copies / 120:.1%}", str(moves.num_rounds)]


def test_files_that_are_not_loads_are_refused(files):
    (files / "text.npy").write_text("not numpy")
    np.save(files / "flat.npy", np.ones(4))
    np.save(files / "objects.npy", np.array([[None]]), allow_pickle=True)
    np.savez(files / "two.npz", LOAD)
    for name, rule in [
        ("none.npy", "cannot be read"), ("text.npy", "cannot be read"), ("objects.npy", "cannot be read"),
        ("flat.npy", "no array with two axes"), ("two.npz", "no array with two axes"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=f"the load .*{name} .*{rule}"):
            run_eplb(EplbRequest(files / name, 40, 8))


@pytest.mark.parametrize(
    ("more", "rule"),
    [
        ({"max_moves": 3}, "--max-moves is counted from a map; give it with --current"),
        ({"policy": "other"}, "policy 'other' is unknown"),
        ({"out": "nowhere/map.npy"}, "nowhere is no folder"),
        ({"plot": "nowhere/plot.svg"}, "nowhere is no folder"),
        ({"current": "loads.npy"}, r"the current map is float64 \[3, 32\]"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(files, more, rule):
    paths = {
        name: files / value if name != "max_moves" and name != "policy" else value
        for name, value in more.items()
    }
    with pytest.raises(ConfigError, match=rule):
        run_eplb(_request(files, **paths))


def test_a_picture_without_matplotlib_is_refused_before_anything_is_planned(files, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(eplb, "make_plan", None)
    with pytest.raises(
        CapabilityError, match=r"matplotlib, which is not installed; it comes with tcomm\[plot\]"
    ):
        run_eplb(_request(files, plot=files / "plot.svg"))


class _Axis:
    def __init__(self):
        self.images, self.texts = [], {}

    def imshow(self, image, **how):
        self.images.append((image, how))

    def set(self, **texts):
        self.texts |= texts

    def set_ylabel(self, text):
        self.texts["ylabel"] = text


class _Figure:
    made = None

    def __init__(self, **_):
        _Figure.made = self
        self.axes = [_Axis(), _Axis()]

    def subplots(self, *_, **__):
        return self.axes

    def colorbar(self, *_, **__):
        pass

    def savefig(self, path):
        if path.suffix != ".svg":
            raise ValueError(f"format {path.suffix} is not supported")
        path.write_text("<svg/>")


def test_a_picture_has_the_load_of_each_gpu_over_the_mean(files, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["matplotlib.figure"].Figure = _Figure
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    found = run_eplb(_request(files, plot=files / "plot.svg"))
    assert (files / "plot.svg").exists()
    (before, how), (after, same) = (axis.images[0] for axis in _Figure.made.axes)
    assert before.shape == after.shape == (3, 8)
    np.testing.assert_allclose(after.mean(axis=1), 1)
    np.testing.assert_allclose(1 / after.max(axis=1), found.plan.balancedness)
    assert how["vmax"] == same["vmax"] == before.max()
    assert _Figure.made.axes[1].texts["title"] == f"after: balancedness {found.plan.balancedness.mean():.3f}"
    with pytest.raises(ConfigError, match=r"--plot .*plot.txt: format .txt is not supported"):
        plot_loads(found, files / "plot.txt")


def test_a_real_picture(files):
    pytest.importorskip("matplotlib")
    path = files / "plot.svg"
    result = CliRunner().invoke(app, ["eplb", str(files / "loads.npy"), *NUMBERS, "--plot", str(path)])
    assert result.exit_code == 0, result.output
    assert "<svg" in path.read_text()
