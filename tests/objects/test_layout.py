import math

import pytest

from tcomm.objects.layout import HEAD, INLINE_BYTES, MARK, Form, Tag, align, is_plain
from tests.objects.test_codec import _Level


def test_the_layout_is_as_documented():
    assert HEAD.pack(MARK, 1, 0, 0x0A0B0C0D) == b"\xc1\x01\x00\x00\x0d\x0c\x0b\x0a"
    assert [tag.name for tag in Tag] == [
        "PLAIN", "LIST", "TUPLE", "DICT", "SET", "FROZENSET", "INT", "STR", "BYTES", "BYTEARRAY", "ARRAY",
        "NUMBER", "TENSOR", "DTYPE", "DEVICE", "SIZE", "REGISTERED",
    ]  # fmt: skip
    assert [int(tag) for tag in Tag] == list(range(17))
    assert {form.name: int(form) for form in Form} == {"TAGGED": 0, "MARKED": 1}


def test_align_goes_up_to_the_next_64():
    assert [align(offset) for offset in (0, 1, 63, 64, 65, 2**40 + 1)] == [0, 64, 64, 64, 128, 2**40 + 64]


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        1,
        2.5,
        math.inf,
        "x",
        b"x",
        [],
        {},
        [1, [2, {"a": b""}]],
        [*range(100)],
        [*range(100), b"", [{}]],
        {1: "x", None: [b"z" * INLINE_BYTES]},
    ],
)
def test_what_msgpack_gives_back_is_plain(value):
    assert is_plain(value, 3)


@pytest.mark.parametrize(
    "value",
    [
        (), [()], [*range(100), ()], [*range(100), [[[]]]], {"a": (1,)}, {(1,): 2}, set(), bytearray(),
        object(), 1j, _Level.HIGH, [1, _Level.HIGH],
        {_Level.HIGH: 1}, b"z" * (INLINE_BYTES + 1), [b"z" * (INLINE_BYTES + 1)],
    ],
)  # fmt: skip
def test_what_msgpack_would_change_is_not_plain(value):
    assert not is_plain(value, 3)


def test_plain_values_lie_at_most_so_deep():
    assert is_plain(1, 0)
    assert not is_plain([], 0)
    assert not is_plain({}, 0)
    assert is_plain([{"a": 1}], 2)
    assert not is_plain([{"a": 1}], 1)
    assert not is_plain({"a": [1]}, 1)
