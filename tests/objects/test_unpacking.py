import pytest
import torch

from tcomm.errors import DecodeError
from tcomm.objects.unpacking import Unpacker, decode_plain


def _unpacker(data=b"", offset=0, sizes=(), max_depth=3, borrow=False):
    return Unpacker(
        memoryview(bytearray(data)), offset, sizes, borrow=borrow, max_depth=max_depth, device=None
    )


def test_a_structure_becomes_its_value():
    data = b"head" + bytes(60) + b"first" + bytes(59) + b"second"
    unpacker = _unpacker(data, 4, [5, 6])
    assert unpacker.finish([2, [9], [8], [3, "a", [4, 1]]]) == (bytearray(b"first"), b"second", {"a": {1}})
    assert _unpacker().finish(decode_plain(b"\x92\x0d\xa4int8")) is torch.int8


def test_a_depth_that_is_left_counts_again():
    assert _unpacker(max_depth=2).finish([2, [2], [2], [0, []]]) == ((), (), [])
    with pytest.raises(DecodeError, match="deeper than max_depth allows"):
        _unpacker(max_depth=2).finish([2, [2, [2]]])
    with pytest.raises(DecodeError, match="deeper than max_depth allows"):
        _unpacker(max_depth=2).finish([2, [2, [0, []]]])


def test_buffers_are_exactly_what_follows():
    with pytest.raises(DecodeError, match="says that it has 69 bytes, and has 68"):
        _unpacker(bytes(68), 4, [5])
    with pytest.raises(DecodeError, match="no possible size"):
        _unpacker(bytes(68), 4, [-1])
    with pytest.raises(DecodeError, match="1 buffers of the message belong to nothing"):
        _unpacker(bytes(68), 4, [4]).finish(None)
    with pytest.raises(DecodeError, match="a datetime stands where none may"):
        _unpacker().finish(decode_plain(b"\xd6\xff\0\0\0\0"))
