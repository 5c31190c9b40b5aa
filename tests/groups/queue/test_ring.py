import pytest

from tcomm.errors import ConfigError, DuplicateRankError
from tcomm.groups.queue.message_queue import MessageQueue
from tcomm.groups.queue.ring import ReaderWord, ShmRingBuffer, SlotWord, State
from tests.groups.queue.peers import pair


def test_slots_and_their_words_are_the_memory_of_all_who_open_the_ring():
    ring = ShmRingBuffer(1, 100, 3)
    other = ShmRingBuffer(*ring.handle())
    for index in range(3):
        with ring.get_data(index) as data, ring.get_metadata(index) as words:
            assert (len(data), len(words)) == (100, 8)
            data[:] = bytes([index + 1]) * 100
            words[SlotWord.TOTAL] = 7 + index
    for index in range(3):
        with other.get_data(index) as data, other.get_metadata(index) as words:
            assert bytes(data) == bytes([index + 1]) * 100
            assert words.tolist() == [0, 0, 7 + index, *[0] * 5]
    for get in (ring.get_data, ring.get_metadata):
        with pytest.raises(ConfigError, match="slot 3 of 3 slots"), get(3):
            pass
    other.close(), ring.close()


def test_of_two_that_open_one_place_at_once_one_gets_it():
    writer = MessageQueue(2, 2, [4, 6], 4096, 2)
    first = MessageQueue.create_from_handle(writer.export_handle(), 4)
    ring = writer._sender.sides[0].ring
    # As it was when the second looked.
    state = ring.reader_line(0) + ReaderWord.STATE
    ring.words[state] = State.ABSENT
    with pytest.raises(DuplicateRankError, match="rank 4 of the queue is taken"):
        MessageQueue.create_from_handle(writer.export_handle(), 4)
    ring.words[state] = State.OPEN
    second = MessageQueue.create_from_handle(writer.export_handle(), 6)
    writer.wait_until_ready(5)
    for queue in (first, second, writer):
        queue.shutdown()


def test_a_place_is_not_taken_again_when_its_reader_has_left():
    with pair(2) as (writer, first, _):
        ring = writer._sender.sides[0].ring
        first.shutdown()
        assert not ring.claim(0)
