import json

import pytest
import torch
from typer.testing import CliRunner

from tcomm.cli.app import app
from tcomm.cli.moe_baselines import DeduplicatedGloo, ExpandedGloo
from tcomm.cli.moe_bench import MoeRequest, _Input, check_moe_request, moe_columns
from tcomm.errors import ConfigError
from tcomm.groups.moe.layers import MoeShape


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"backends": ("pigeon",)}, "'pigeon' is no backend; give high_throughput"),
        ({"tokens": (0,)}, "positive numbers"),
        ({"ranks": 3}, "256 experts, top 8, 3 ranks"),
        ({"top_k": 300}, "top 300"),
        ({"dtype": "bf16"}, "'bf16' is no dtype"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        check_moe_request(MoeRequest(**changes))


def _gloo(member):
    member.process_group()
    x = torch.arange(8.0).view(2, 4) + 10 * member.rank
    idx = torch.tensor([[0, 3], [2, 1]])
    weights = torch.tensor([[0.5, 2.0], [1.0, 3.0]])
    apart = ExpandedGloo(4).forward(x, idx, weights)
    together = DeduplicatedGloo(4).forward(x, idx, weights)
    return [torch.equal(apart, x * weights.sum(1, keepdim=True)), torch.equal(together, 2 * x)]


def test_the_baselines_bring_every_row_there_and_back(on_ranks):
    assert on_ranks(2, _gloo) == [[True, True]] * 2


@pytest.mark.parametrize("sums_experts", [True, False])
def test_each_wrong_element_is_counted_and_so_is_what_is_no_number(sums_experts):
    data = _Input(MoeShape(4, 2, 8, 3, torch.bfloat16), 0, 2)
    idx = data.idx // 2
    factors = data.weights.sum(1) if sums_experts else 1 + (idx[:, 0] != idx[:, 1]).float()
    right = (data.x.float() * factors[:, None]).to(torch.bfloat16)
    assert data.count_wrong(right, sums_experts) == 0
    right[0, 1] *= 1.1
    right[1, 2:4] = float("nan")
    assert data.count_wrong(right, sums_experts) == 3


def test_bench_writes_a_row_for_each_backend_and_baseline(forked_ranks, tmp_path):
    path = tmp_path / "rows.json"
    command = [
        "bench", "moe", "--ranks", "2", "--tokens", "5", "--hidden", "64", "--topk", "2", "--experts", "8",
        "--backends", "high_throughput,low_latency,all_gather", "--blocks", "1", "--calls", "2",
        "--json", str(path),
    ]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    rows = json.loads(path.read_text())
    assert [(row["backend"], row["baseline"]) for row in rows] == [
        (name, baseline)
        for name in ("high_throughput", "low_latency", "all_gather") for baseline in ("gloo", "gloo dedup")
    ]  # fmt: skip
    for row, columns in zip(rows, moe_columns(rows), strict=True):
        assert row["checked"]
        assert row["tokens"] == 5
        assert row["wire_nbytes"] > 0
        assert row["ratio"] == pytest.approx(row["baseline_us"] / row["median_us"])
        assert columns[1] in done.output


def test_moe_knows_gloo_alone():
    done = CliRunner().invoke(app, ["bench", "moe", "--against", "mpi"])
    assert isinstance(done.exception, ConfigError)
    assert "moe is measured against gloo" in str(done.exception)
