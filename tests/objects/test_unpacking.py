import pytest
import torch

from tcomm.errors import DecodeError
from tcomm.objects.registry import find_registered
from tcomm.objects.unpacking import Unpacker, decode_plain
from tests.objects.values import Point


def _unpacker(data=b"", offset=0, sizes=(), max_depth=3, borrow=False):
    return Unpacker(
        memoryview(bytearray(data)), offset, sizes, borrow=borrow, max_depth=max_depth, device=None
    )


def test_a_structure_becomes_its_value():
    data = b"head" + bytes(60) + b"first" + bytes(59) + b"second"
    unpacker = _unpacker(data, 4, [5, 6])
    assert unpacker.finish([2, [9], [8], [3, "a", [4, 1]]]) == (bytearray(b"first"), b"second", {"a": {1}})
    numbers = [[6, b"\0\1"], [7, b"x"], [11, "|u1B", b"\2"], [14, "cuda", 3], [15, 4]]
    assert _unpacker().finish([1, *numbers]) == [256, "x", 2, torch.device("cuda:3"), torch.Size([4])]
    assert _unpacker(bytes(68), 4, [4]).finish([5, [8]]) == frozenset([bytes(4)])
    assert _unpacker(bytes(68), 4, [4]).finish([10, "<f4f", [1]]).tolist() == [0]
    assert _unpacker(bytes(68), 4, [4]).finish([12, "int8", "cpu", [2, 2]]).tolist() == [[0, 0], [0, 0]]
    assert _unpacker().finish(decode_plain(b"\x92\x0d\xa4int8")) is torch.int8


def test_a_class_is_made_of_its_fields():
    entry, fingerprint = find_registered(Point)
    assert _unpacker().finish([16, entry.name, fingerprint, 1, [2]]) == Point(1, ())
    with pytest.raises(DecodeError, match="came with 1 fields and has 2"):
        _unpacker().finish([16, entry.name, fingerprint, 1])


def test_a_depth_that_is_left_counts_again():
    assert _unpacker(max_depth=2).finish([2, [2], [2], [0, []]]) == ((), (), [])
    with pytest.raises(DecodeError, match="deeper than max_depth allows"):
        _unpacker(max_depth=2).finish([2, [2, [2]]])
    with pytest.raises(DecodeError, match="deeper than max_depth allows"):
        _unpacker(max_depth=2).finish([2, [2, [0, []]]])


def test_a_dict_counts_for_the_depth_and_no_longer_than_it_lasts():
    shallow = [3, "a", [3], "b", [3], "c", [0, {}]]
    assert _unpacker(max_depth=2).finish(shallow) == {"a": {}, "b": {}, "c": {}}
    with pytest.raises(DecodeError, match="deeper than max_depth allows"):
        _unpacker(max_depth=1).finish(shallow)


def test_buffers_are_exactly_what_follows():
    with pytest.raises(DecodeError, match="says that it has 69 bytes, and has 68"):
        _unpacker(bytes(68), 4, [5])
    with pytest.raises(DecodeError, match="no possible size"):
        _unpacker(bytes(68), 4, [-1])
    with pytest.raises(DecodeError, match="1 buffers of the message belong to nothing"):
        _unpacker(bytes(68), 4, [4]).finish(None)
    with pytest.raises(DecodeError, match="a datetime stands where none may"):
        _unpacker().finish(decode_plain(b"\xd6\xff\0\0\0\0"))
