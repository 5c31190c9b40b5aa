import json
import types

import pytest
from typer.testing import CliRunner

from tcomm.cli import object_bench
from tcomm.cli.app import app
from tcomm.cli.object_bench import ObjectRequest, check_object_request, message_of, object_columns
from tcomm.errors import ConfigError
from tcomm.objects.codec import encode


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"readers": (0,)}, "positive numbers"),
        ({"sizes": (10,)}, "give 64 bytes or more"),
        ({"against": ("smoke",)}, "'smoke' is not a baseline; give gloo or zmq"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(changes, told):
    given = {"readers": (1,), "sizes": (100,)} | changes
    with pytest.raises(ConfigError, match=told):
        check_object_request(ObjectRequest(**given))


def test_without_zmq_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(object_bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"zmq is not installed; it comes with tcomm\[zmq\]"):
        check_object_request(ObjectRequest((1,), (100,), ("zmq",)))


@pytest.mark.parametrize("nbytes", [100, 10240, 1 << 20])
def test_a_message_has_about_the_size_asked_for(nbytes):
    assert len(message_of(nbytes)["data"]) == nbytes - 40
    assert 0.9 * nbytes <= encode(message_of(nbytes)).nbytes <= 1.1 * nbytes + 64


def test_bench_writes_a_row_for_each_number_of_readers_size_and_baseline(forked_ranks, tmp_path):
    path = tmp_path / "rows.json"
    against = "gloo"
    if object_bench.importlib.util.find_spec("zmq") is not None:
        against = "gloo,zmq"
    command = [
        "bench", "object_broadcast", "--readers", "1,2", "--sizes", "100B,10KiB", "--against", against,
        "--blocks", "1", "--calls", "3", "--json", str(path),
    ]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    rows = json.loads(path.read_text())
    assert [(row["readers"], row["nbytes"], row["baseline"]) for row in rows] == [
        (readers, nbytes, name)
        for readers in (1, 2) for nbytes in (100, 10240) for name in against.split(",")
    ]  # fmt: skip
    for row, columns in zip(rows, object_columns(rows), strict=True):
        assert row["checked"]
        assert row["ratio"] == pytest.approx(row["baseline_us"] / row["median_us"])
        assert f"{row['median_us']:.1f}" in columns
        assert columns[0] in done.stdout


def test_readers_that_are_no_numbers_are_a_sentence(programs):
    done = programs.run("-m", "tcomm", "bench", "object_broadcast", "--readers", "one")
    assert (done.returncode, done.stderr) == (
        1, "tcomm: ConfigError: --readers 'one' is not numbers with commas between\n",
    )  # fmt: skip


def test_every_wrong_byte_and_value_is_counted(monkeypatch):
    monkeypatch.setattr(object_bench.dist, "get_rank", lambda: 1)
    value = message_of(10_000)
    assert 0 not in value["data"]
    flipped = bytearray(value["data"])
    flipped[-1] ^= 1
    wrong = [
        value | {"data": bytes(flipped)},
        value | {"data": value["data"][:-1]},
        value | {"data": bytearray(value["data"])},
        value | {"ids": [1, 2, 4]},
        value | {"more": None},
        value | {"data": None},
        {"op": "step"},
        None,
    ]
    came = [value, *wrong]
    candidate = object_bench._candidate(types.SimpleNamespace(take=came.pop), value)
    for expected in [1] * len(wrong) + [0]:
        candidate.prepare()
        candidate.run()
        assert candidate.count_wrong() == expected
