import copy

import msgspec
import numpy as np
import pytest

from tcomm.objects.codec import decode, encode
from tcomm.objects.marked import encode_marked, is_marked
from tests.objects.values import Point, same

LARGE = b"x" * 65537
MARK = msgspec.msgpack.Ext(8, b"\xce\x00\x01\x00\x01")


@pytest.mark.parametrize(
    ("value", "structure", "buffers"),
    [
        ([LARGE], [MARK], [LARGE]),
        ({"a": [1, b"y"], "b": LARGE, None: 2.5}, {"a": [1, b"y"], "b": MARK, None: 2.5}, [LARGE]),
        ({1: LARGE, "x": LARGE[1:], 2: LARGE}, {1: MARK, "x": LARGE[1:], 2: MARK}, [LARGE, LARGE]),
    ],
)
def test_the_structure_is_as_documented(value, structure, buffers):
    made, given = encode_marked(value, 8)
    assert msgspec.msgpack.decode(made) == structure
    assert [bytes(buffer) for buffer in given] == buffers


def test_a_message_has_marks_where_nothing_needs_tags():
    assert encode({"a": LARGE}).join()[:4] == b"\xc1\1\1\0"
    assert encode({"a": LARGE, "b": ()}).join()[:4] == b"\xc1\1\0\0"


def test_what_is_encoded_stays_as_it_is():
    inner = [1]
    value = {"a": LARGE, "l": inner}
    before = copy.deepcopy(value)
    encode_marked(value, 8)
    assert same(value, before)
    assert value["l"] is inner
    assert encode_marked([LARGE], 8)[1][0].obj is LARGE


@pytest.mark.parametrize(
    "value",
    [
        LARGE, (LARGE,), {LARGE}, [1], {}, [LARGE[1:]], [LARGE, ()], {"a": LARGE, "b": [{1}]}, {b"k": LARGE},
        {(): LARGE}, Point(LARGE), [Point(1), LARGE], [2**64, LARGE], ["\ud800", LARGE], [np.int8(1), LARGE],
        [bytearray(LARGE)], [np.zeros(70_000, np.uint8)], [[LARGE]], [LARGE, [LARGE]], [LARGE, np.ones(1)],
    ],
)  # fmt: skip
def test_what_else_there_is_has_no_marks(value):
    assert encode_marked(value, 8) is None
    assert same(decode(encode(value).join()), value)


def test_containers_are_counted():
    value = [LARGE, [[1]]]
    assert encode_marked(value, 2) is None
    structure, _ = encode_marked(value, 3)
    message = encode(value, max_depth=3).join()
    assert structure in message
    assert decode(message, max_depth=3) == value


def test_buffers_go_where_they_were_taken_from():
    value = {"b": LARGE, "a": LARGE + b"1", "s": b"s", 0: [LARGE + b"2"][0], "n": {"x": [1, b""]}}
    assert same(decode(encode(value).join()), value)
    assert same(decode(bytearray(encode(value).join()), borrow=True), value)


@pytest.mark.parametrize(
    ("value", "may_travel"),
    [
        ([LARGE, 1], True),
        ({"a": LARGE, 2: [b""]}, True),
        ([], True),
        (LARGE, False),
        (1, False),
        ([(1,)], False),
        ({b"k": LARGE}, False),
        ([[LARGE]], False),
        ({"a": [[[1]]]}, False),
    ],
)
def test_what_came_is_told_from_what_could_not_be_sent(value, may_travel):
    assert is_marked(value, 3) is may_travel
