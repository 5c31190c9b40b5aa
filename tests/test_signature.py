import zlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcomm.signature import CallDescription, decode_description

BASE = CallDescription("all_reduce", "float32", (2, 3), "sum", algorithm="cpu:two_shot")

SPLITS = st.lists(st.integers(0, 1 << 40), max_size=16).map(tuple)
CALLS = st.builds(
    CallDescription,
    op=st.text(max_size=20),
    dtype=st.text(max_size=10),
    shape=SPLITS,
    reduce=st.text(max_size=5),
    root=st.integers(-1, 15),
    dim=st.integers(0, 15),
    sizes=SPLITS,
    contents=st.text(max_size=20),
    algorithm=st.text(max_size=20),
    send_splits=SPLITS,
    recv_splits=SPLITS,
)


@pytest.mark.parametrize(
    "change",
    [
        {"op": "broadcast"},
        {"dtype": "float16"},
        {"shape": (3, 2)},
        {"shape": (2, 3, 1)},
        {"shape": ()},
        {"reduce": "max"},
        {"root": 0},
        {"dim": 1},
        {"sizes": (1, 2)},
        {"sizes": (2, 1)},
        {"contents": "int8 [2]"},
        {"algorithm": "triton:two_shot"},
    ],
)
def test_whatever_ranks_must_share_changes_the_signature(change):
    assert msgspec.structs.replace(BASE, **change).signature != BASE.signature


def test_splits_are_compared_elsewhere():
    assert msgspec.structs.replace(BASE, send_splits=(1, 2), recv_splits=(3,)).signature == BASE.signature


def test_fields_do_not_run_into_one_another():
    first, second = CallDescription("a", "bc"), CallDescription("ab", "c")
    assert first.signature != second.signature


@given(CALLS)
def test_a_description_comes_back_and_its_signature_is_32_bits(call):
    assert decode_description(call.encode()) == call
    assert 0 <= call.signature < 1 << 32
    assert decode_description(call.encode()).signature == call.signature


def test_the_signature_is_a_checksum_that_every_process_computes_alike():
    shared = ("barrier", "", (), "", -1, 0, (), "", "")
    assert CallDescription("barrier").signature == zlib.crc32(msgspec.msgpack.encode(shared))


@given(st.binary(max_size=64))
def test_bytes_that_make_no_sense_are_none(data):
    decoded = decode_description(data)
    assert decoded is None or isinstance(decoded, CallDescription)


@given(CALLS, st.integers(1, 20))
def test_a_description_that_was_cut_short_is_none(call, cut):
    assert decode_description(call.encode()[:-cut]) is None


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (BASE, "all_reduce float32 [2, 3] sum via cpu:two_shot"),
        (CallDescription("barrier"), "barrier"),
        (CallDescription("broadcast", "int8", (), root=2), "broadcast int8 [] root=2"),
        (
            CallDescription("all_to_all_single", "int8", (4,), send_splits=(1, 0), recv_splits=(2, 2)),
            "all_to_all_single int8 [4] send=[1, 0] recv=[2, 2]",
        ),
        (
            CallDescription("all_gatherv", "int8", (2, 5), dim=1, sizes=(0, 5), algorithm="cpu:pull"),
            "all_gatherv int8 [2, 5] dim=1 sizes=[0, 5] via cpu:pull",
        ),
        (
            CallDescription("all_reduce", "int8", (5,), "sum", contents="int8 [2]; int8 [3]"),
            "all_reduce int8 [5] sum of int8 [2]; int8 [3]",
        ),
    ],
)
def test_a_call_is_one_line_of_a_table(call, line):
    assert str(call) == line
