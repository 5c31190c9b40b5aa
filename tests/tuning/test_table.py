import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcomm.algorithms import ALGORITHMS
from tcomm.errors import ConfigError
from tcomm.tuning.table import Row, Table, decode_table, joined, load_table

GOOD = {"format": 1, "machine": "", "versions": "", "date": "", "command": "", "rows": []}
ROW = {"op": "all_reduce", "algorithm": "cpu:two_shot", "max_nbytes": 4096}

ROWS = st.builds(
    Row,
    op=st.sampled_from(["all_reduce", "broadcast"]),
    algorithm=st.sampled_from([a.name for a in ALGORITHMS["all_reduce"]]),
    max_nbytes=st.none() | st.integers(0, 1 << 20),
    min_ranks=st.integers(2, 8),
    max_ranks=st.integers(2, 16),
)


def _table(rows):
    return Table(1, "m", "v", "d", "c", tuple(rows))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "truncated"),
        (b"nonsense", "malformed"),
        (json.dumps([]), "Expected `object`, got `array`"),
        (json.dumps({"format": 1}), "missing required field `machine`"),
        (json.dumps(GOOD | {"rows": [ROW | {"max_nbytes": "many"}]}), "`$.rows[0].max_nbytes`"),
        (
            json.dumps(GOOD | {"rows": [{"op": "x", "max_nbytes": None}]}),
            "field `algorithm` - at `$.rows[0]`",
        ),
    ],
)
def test_a_table_that_is_none_is_refused_with_its_source_and_field(data, told):
    with pytest.raises(ConfigError) as caught:
        decode_table(data if isinstance(data, bytes) else data.encode(), "here")
    assert str(caught.value).startswith("here is not a tuning table: ")
    assert told in str(caught.value)


def test_a_table_of_another_format_is_refused():
    with pytest.raises(ConfigError) as caught:
        decode_table(json.dumps(GOOD | {"format": 2}).encode(), "here")
    assert str(caught.value) == "here is a tuning table of format 2; this tcomm reads 1"


def test_a_table_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_table(str(tmp_path / "none"))
    assert str(caught.value) == f"tuning table '{tmp_path}/none' cannot be read: No such file or directory"
    (tmp_path / "bad").write_bytes(b"{}")
    with pytest.raises(ConfigError, match="bad is not a tuning table"):
        load_table(str(tmp_path / "bad"))


def test_the_first_row_that_covers_a_call_decides():
    rows = [
        Row("all_reduce", "cpu:one_shot_pull", 100, max_ranks=2),
        Row("all_reduce", "triton:two_shot", None),
        Row("all_reduce", "cpu:one_shot_push", 100),
        Row("all_reduce", "cpu:two_shot", None, min_ranks=3),
        Row("broadcast", "cpu:two_shot", None),
    ]
    table = _table(rows)
    assert table.pick("all_reduce", "cpu", 2, 100) is rows[0]
    assert table.pick("all_reduce", "cpu", 3, 100) is rows[2]
    assert table.pick("all_reduce", "cpu", 3, 101) is rows[3]
    assert table.pick("all_reduce", "cpu", 2, 101) is None
    assert table.pick("all_reduce", "triton", 16, 1) is rows[1]
    assert table.pick("all_reduce", "triton", 17, 1) is None
    assert table.pick("broadcast", "cpu", 2, 1) is rows[4]


def test_rows_of_a_kind_of_gpu_speak_of_no_other_and_not_of_host_memory():
    rows = [
        Row("all_reduce", "triton:two_shot", 100, device="h100"),
        Row("all_reduce", "torch:nccl", None, device="h100"),
        Row("all_reduce", "cpu:two_shot", None),
        Row("all_reduce", "triton:one_shot_ll", None),
    ]
    table = _table(rows)
    assert table.pick("all_reduce", "", 8, 100, "h100") is rows[0]
    assert table.pick("all_reduce", "", 8, 101, "h100") is rows[1]
    assert table.pick("all_reduce", "triton", 8, 101, "h100") is None
    assert table.pick("all_reduce", "", 8, 1, "h200") is None
    assert table.pick("all_reduce", "triton", 8, 100) is rows[3]
    assert table.pick("all_reduce", "cpu", 8, 100) is rows[2]


def test_a_table_without_devices_is_one_of_host_memory():
    table = decode_table(json.dumps(GOOD | {"rows": [ROW]}).encode(), "here")
    assert table.rows[0].device == ""


def test_tables_that_come_along_are_joined_in_order():
    first, second = _table([Row("all_reduce", "cpu:two_shot", 1)]), _table([Row("broadcast", "cpu:pull", 2)])
    assert joined([first]) is first
    both = joined([first, second])
    assert both.rows == (*first.rows, *second.rows)
    assert (both.machine, both.date) == ("m; m", "d; d")
    assert decode_table(both.encode(), "memory") == both


@given(
    st.lists(ROWS, max_size=6),
    st.sampled_from(["cpu", "triton"]),
    st.integers(2, 16),
    st.integers(0, 1 << 21),
)
def test_a_pick_covers_the_call_and_nothing_before_it_does(rows, engine, world_size, nbytes):
    picked = _table(rows).pick("all_reduce", engine, world_size, nbytes)
    covering = [row for row in rows if row.covers("all_reduce", engine, world_size, nbytes)]
    assert picked is (covering[0] if covering else None)
    for row in covering:
        assert (row.op, row.engine) == ("all_reduce", engine)
        assert row.min_ranks <= world_size <= row.max_ranks
        assert row.max_nbytes is None or nbytes <= row.max_nbytes


@given(st.lists(ROWS, max_size=4))
def test_a_table_comes_back_from_its_bytes_with_its_digest(rows):
    table = _table(rows)
    again = decode_table(table.encode(), "memory")
    assert again == table
    assert again.digest == table.digest
    assert _table([*rows, Row("x", "cpu:y", None)]).digest != table.digest


def test_the_table_that_comes_along_covers_every_world_and_size_by_known_algorithms():
    table = load_table()
    known = {a.name for a in ALGORITHMS["all_reduce"]}
    assert {row.algorithm for row in table.rows if row.op == "all_reduce"} <= known
    for engine in ("cpu", "triton"):
        for world_size in range(2, 17):
            for nbytes in (0, 1, 65536, 65537, 1 << 34):
                row = table.pick("all_reduce", engine, world_size, nbytes)
                assert row is not None, (engine, world_size, nbytes)
                assert row.piece_nbytes % 128 == 0
