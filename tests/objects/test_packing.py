import dataclasses

import msgspec
import numpy as np
import pytest
import torch

from tcomm.errors import ConfigError
from tcomm.objects.codec import register
from tcomm.objects.packing import Packer, encode_plain
from tcomm.objects.registry import find_registered
from tests.objects.values import Point


@register
@dataclasses.dataclass
class Bare:
    x: int


def _packed(value):
    packer = Packer(8)
    return msgspec.msgpack.decode(encode_plain(packer.pack(value))), [bytes(b) for b in packer.buffers]


@pytest.mark.parametrize(
    ("value", "structure", "buffers"),
    [
        (5, 5, []),
        ((1.5, None, "x"), [2, 1.5, None, "x"], []),
        (2**64, [6, b"\0" * 8 + b"\x01"], []),
        (-(2**64), [6, b"\0" * 8 + b"\xff"], []),
        ("\ud800", [7, b"\xed\xa0\x80"], []),
        ([1, ["x"]], [0, [1, ["x"]]], []),
        ([1, 2**64], [1, 1, [6, b"\0" * 8 + b"\x01"]], []),
        ((1, [2]), [2, 1, [0, [2]]], []),
        ({"a": 1}, [0, {"a": 1}], []),
        ({"a": ()}, [3, "a", [2]], []),
        ({1}, [4, 1], []),
        (frozenset([1]), [5, 1], []),
        (b"x" * 65537, [8], [b"x" * 65537]),
        (bytearray(b"x"), [9], [b"x"]),
        (np.ones((1, 2), np.int8), [10, "|i1b", [1, 2]], [b"\1\1"]),
        (np.int8(3), [11, "|i1b", b"\3"], []),
        (torch.ones(2, dtype=torch.int8), [12, "int8", "cpu", [2]], [b"\1\1"]),
        (torch.bfloat16, [13, "bfloat16"], []),
        (torch.device("cuda", 3), [14, "cuda", 3], []),
        (torch.Size([2, 3]), [15, 2, 3], []),
    ],
)
def test_the_structure_is_as_documented(value, structure, buffers):
    assert _packed(value) == (structure, buffers)


@pytest.mark.parametrize(
    ("value", "structure"),
    [([2**64], [1, [6, b"\0" * 8 + b"\x01"]]), ({"a": ()}, [3, "a", [2]]), ((1,), [2, 1])],
)
def test_what_is_known_not_to_be_plain_is_not_looked_at_again(monkeypatch, value, structure):
    def look(*_):
        raise AssertionError("looked at")

    monkeypatch.setattr(Packer, "_plain", look)
    packer = Packer(8)
    assert msgspec.msgpack.decode(encode_plain(packer.pack_tagged(value))) == structure


def test_a_registered_class_goes_by_its_name_and_fingerprint():
    entry, fingerprint = find_registered(Point)
    assert _packed(Point(1, (2,))) == ([16, entry.name, fingerprint, 1, [2, 2]], [])
    lacking = Bare(1)
    del lacking.x
    with pytest.raises(ConfigError, match=r"value\[0\] lacks a field: .*'x'"):
        Packer(8).pack((lacking,))


def test_refuse_says_where_and_long_paths_and_keys_are_cut():
    with pytest.raises(ConfigError, match=r"^value is odd$"):
        Packer(8).refuse("is odd")
    value = object()
    for _ in range(20):
        value = (value,)
    with pytest.raises(ConfigError, match=r"^value(\[0\]){12}\.\.\. is a object"):
        Packer(64).pack(value)
    with pytest.raises(ConfigError, match=r"^value\['k{36}\.\.\.\] is a object"):
        Packer(8).pack({"k" * 1000: object()})
