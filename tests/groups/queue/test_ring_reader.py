import threading
import time

import numpy as np
import pytest

from tcomm.errors import DecodeError, PeerTimeoutError
from tcomm.groups.queue.ring import LINE, PIECE_BYTES, WITHDRAWN, ReaderWord, SlotWord, Word
from tcomm.objects.codec import encode
from tests.groups.queue.peers import pair

LONG = 3 * PIECE_BYTES


def test_a_reader_sees_whether_a_chunk_has_come_and_how_many_were_taken():
    with pair(2) as (writer, first, second):
        sources = [reader._receiver.source for reader in (first, second)]
        assert [source.has_chunk() for source in sources] == [False, False]
        writer.enqueue("value")
        assert [source.has_chunk() for source in sources] == [True, True]
        assert first.dequeue(5) == "value"
        assert [source.has_chunk() for source in sources] == [False, True]


def test_a_chunk_is_there_once_it_has_its_number_and_also_before_the_head_counts_it():
    with pair() as (writer, reader):
        source = reader._receiver.source
        words = source.ring.words
        writer.enqueue("first")
        words[Word.HEAD] = 0
        assert (source.has_chunk(), reader.dequeue(5), source.has_chunk()) == (True, "first", False)
        words[Word.HEAD] = 1
        assert not source.has_chunk()
        writer.enqueue("second")
        assert reader.dequeue(5) == "second"


def _begins_at(view, memory):
    return np.frombuffer(view, np.uint8).ctypes.data == np.frombuffer(memory, np.uint8).ctypes.data


def test_a_message_of_one_chunk_is_taken_where_it_lies_and_only_if_it_can_lie_there():
    with pair(chunk_bytes=1 << 20, chunks=4) as (writer, reader):
        source = reader._receiver.source
        ring = source.ring
        messages = [bytes([number]) * LONG for number in (1, 2)]
        for message in messages:
            writer.enqueue(message)
        # The second one finds the shared place taken.
        for number, (message, memory) in enumerate(zip(messages, (ring.shared, ring.slots[1]), strict=True)):
            taken = source.take()
            assert taken.nbytes == encode(message).nbytes
            assert _begins_at(taken, memory)
            length = ring.slots_begin + LINE * number + SlotWord.LENGTH
            nbytes, ring.words[length] = ring.words[length], (1 << 20) + 1
            assert source.take() is None
            with pytest.raises(DecodeError, match="a slot of 1048576 bytes says that it holds 1048577"):
                source.look()
            ring.words[length] = nbytes
            assert reader.dequeue(5) == message


IMPOSSIBLE = (WITHDRAWN - 1, -(2**63), 3 * PIECE_BYTES, 2**63 - 1)


@pytest.mark.parametrize(
    ("filled", "told"),
    [
        (PIECE_BYTES, rf"has {PIECE_BYTES} bytes of \d+, and will get no more"),
        *[(filled, f"says that {filled} of them are there") for filled in IMPOSSIBLE],
    ],
)
def test_a_long_message_with_an_impossible_count_of_its_bytes_is_one_clear_error(filled, told):
    with pair(chunk_bytes=1 << 20) as (writer, reader):
        ring = reader._receiver.source.ring
        writer.enqueue(bytes(2 * PIECE_BYTES))
        writer.enqueue("after")
        ring.words[ring.slots_begin + SlotWord.FILLED] = filled
        with pytest.raises(DecodeError, match=told):
            reader.dequeue(5)
        assert reader.dequeue(5) == "after"


class _WordsThatChange:
    """Words of which one is something else after it was looked at `looks` times."""

    def __init__(self, words, index, looks, later):
        self._words, self._index, self._looks, self._later = words, index, looks, later

    def __getitem__(self, index):
        value = self._words[index]
        if index == self._index:
            self._looks -= 1
            if not self._looks:
                self._words[index] = self._later
        return value

    def __setitem__(self, index, value):
        self._words[index] = value


@pytest.mark.parametrize("looks", range(1, 9))
def test_a_message_may_be_taken_back_between_any_two_looks_at_it(looks):
    with pair(chunk_bytes=1 << 20) as (writer, reader):
        source = reader._receiver.source
        filled = source.ring.slots_begin + SlotWord.FILLED
        writer.enqueue(bytes(3 * PIECE_BYTES))
        writer.enqueue("after")
        source.ring.words[filled] = 2 * PIECE_BYTES
        source._words = _WordsThatChange(source.ring.words, filled, looks, WITHDRAWN)
        source.ring.words[Word.HEAD] = 1
        assert reader.dequeue(5) == "after"


def test_a_reader_says_when_it_last_waited_and_not_when_it_took_a_chunk():
    with pair() as (writer, reader):
        ring = reader._receiver.source
        place = ring.ring.reader_line(0) + ReaderWord.IDLE_NS
        writer.enqueue(1)
        writer.enqueue(2)
        opened = ring.ring.words[place]
        assert 0 < opened < time.monotonic_ns()
        assert [reader.dequeue(5), reader.dequeue(5)] == [1, 2]
        assert ring.ring.words[place] == opened
        assert ring.take() is None
        assert opened < ring.ring.words[place]
        for wait in (reader.dequeue, lambda seconds: reader.acquire_read(seconds).__enter__()):
            before = time.monotonic_ns()
            with pytest.raises(PeerTimeoutError):
                wait(0.01)
            assert before < ring.ring.words[place] < time.monotonic_ns()


def test_the_time_of_a_wait_is_that_of_its_end():
    with pair() as (writer, reader):
        ring = reader._receiver.source
        late = threading.Timer(0.3, writer.enqueue, ["late"])
        late.start()
        began = time.monotonic_ns()
        assert reader.dequeue(5) == "late"
        # It still looks after its readers.
        late.join()
        assert ring.ring.words[ring.ring.reader_line(0) + ReaderWord.IDLE_NS] > began + 0.2e9
