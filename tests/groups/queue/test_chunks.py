import pytest

from tcomm.errors import DecodeError
from tcomm.groups.queue.chunks import Assembler


def _add(assembler, message, begin, end):
    got = assembler.add(len(message), begin, memoryview(message)[begin:end])
    return None if got is None else bytes(got)


def test_a_chunk_that_comes_twice_in_a_row_counts_once():
    assembler, message = Assembler(), bytes(range(100))
    for begin, end in [(0, 40), (0, 40), (40, 80), (40, 80)]:
        assert _add(assembler, message, begin, end) is None
    assert [_add(assembler, message, 80, 100) for _ in range(2)] == [message] * 2
    assembler.drop()
    assert not assembler.is_open
    assert _add(assembler, message, 80, 100) is None


def test_a_chunk_that_comes_again_later_is_refused():
    assembler, message = Assembler(), bytes(range(100))
    for begin, end in [(0, 40), (40, 60), (60, 80)]:
        assert _add(assembler, message, begin, end) is None
    with pytest.raises(DecodeError, match="bytes 40 to 60 of 100 follows 80 of 100"):
        _add(assembler, message, 40, 60)
    assert not assembler.is_open
