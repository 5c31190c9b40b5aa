import copy

import msgspec
import numpy as np
import pytest

from tcomm.errors import ConfigError, DecodeError
from tcomm.objects.codec import decode, encode
from tcomm.objects.marked import encode_marked
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
    for arrived in (None, lambda _: len(message)):
        with pytest.raises(DecodeError, match="deeper than max_depth allows"):
            decode(message, max_depth=2, arrived=arrived)


def test_buffers_go_where_they_were_taken_from():
    value = {"b": LARGE, "a": LARGE + b"1", "s": b"s", 0: [LARGE + b"2"][0], "n": {"x": [1, b""]}}
    assert same(decode(encode(value).join()), value)
    assert same(decode(bytearray(encode(value).join()), borrow=True), value)


class _Odd:
    """A key that can be looked up once."""

    def __init__(self):
        self.looked = 0

    def __hash__(self):
        self.looked += 1
        if self.looked > 1:
            raise KeyError("looked up twice")
        return 1


def test_a_key_that_may_not_travel_is_not_touched():
    assert encode_marked({_Odd(): LARGE}, 8) is None
    with pytest.raises(ConfigError, match=r"^value\.keys\(\) is a .*_Odd, which may not travel"):
        encode({_Odd(): LARGE})
