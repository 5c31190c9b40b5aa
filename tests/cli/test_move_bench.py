import json

import pytest
import torch
from typer.testing import CliRunner

from tcomm.cli.app import app
from tcomm.cli.move_bench import MoveRequest, _Layer, check_move_request, move_columns
from tcomm.errors import ConfigError


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"ranks": 1}, "nothing moves between fewer than two"),
        ({"sizes": (12,)}, "multiples of 8"),
        ({"sizes": ()}, "multiples of 8"),
        ({"num_experts": 6}, "6 experts do not divide among 4 ranks"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        check_move_request(MoveRequest(**changes))


def test_each_wrong_element_is_counted():
    request = MoveRequest(ranks=2, num_experts=4)
    layer = _Layer(request.shape, request.maps(), 1, 24)
    assert layer.count_wrong() == 0
    layer.weight[0, 1:] += 1
    assert layer.count_wrong() == 2
    # Where nothing moves, all rows of experts that should be others are wrong.
    layer = _Layer(request.shape, request.maps(), 1, 24)
    layer.candidate(lambda turn, weight: None).run()
    first, second = (torch.from_numpy(phy2log[0, 6:]) for phy2log in request.maps())
    assert layer.count_wrong() == 3 * int((first != second).sum()) > 0


def test_bench_writes_a_row_for_each_size(forked_ranks, tmp_path):
    path = tmp_path / "rows.json"
    command = [
        "bench", "expert_moves", "--ranks", "2", "--sizes", "64,4096", "--experts", "8", "--blocks", "1",
        "--calls", "2", "--json", str(path),
    ]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())
    assert [row["nbytes"] for row in rows] == [64, 4096]
    for row, columns in zip(rows, move_columns(rows), strict=True):
        assert row["checked"]
        assert row["copies"] >= row["rounds"] > 0
        assert row["ratio"] == row["baseline_us"] / row["median_us"]
        assert columns[:3] == [str(row["nbytes"]), str(row["copies"]), str(row["rounds"])]
    assert "16 slots" in result.output
