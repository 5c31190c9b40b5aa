import functools

import pytest

from tcomm.errors import ConfigError, DuplicateRankError
from tcomm.groups.queue.message_queue import MessageQueue
from tcomm.groups.queue.ring import ReaderWord, ShmRingBuffer, SlotWord, State, Word
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


@pytest.mark.parametrize("cannot", [None, 0, 1, 2])
def test_nobody_passes_a_barrier_with_a_message_unless_somebody_cannot_be_ordered(monkeypatch, cannot):
    answers = [number != cannot for number in range(3)]
    monkeypatch.setattr("tcomm.groups.queue.ring.can_be_ordered", lambda: answers.pop(0))
    with pair(2) as (writer, *readers):
        sides = [writer._sender.sides[0], *(reader._receiver.source for reader in readers)]
        assert [side.ring.is_fenced for side in sides] == [cannot is not None] * 3
        assert [side._fence is None for side in sides] == [cannot is None] * 3
        writer.enqueue("value")
        assert [reader.dequeue(5) for reader in readers] == ["value", "value"]


class SleepsError(Exception):
    pass


def test_who_goes_to_sleep_says_so_and_orders_the_others_before(monkeypatch):
    with pair(chunks=1) as (writer, reader):
        ring = reader._receiver.source.ring
        words, steps = ring.words, []

        def sleep(asleep, *_):
            assert words[asleep] == 1
            steps.append("sleep")
            raise SleepsError

        line = ring.reader_line(0)
        for module, asleep in (("ring_writer", Word.ASLEEP), ("ring_reader", line + ReaderWord.ASLEEP)):
            room = f"tcomm.groups.queue.{module}"
            monkeypatch.setattr(f"{room}.order_others", lambda at=asleep: steps.append(words[at]))
            monkeypatch.setattr(f"{room}.sleep_while", functools.partial(sleep, asleep))
        with pytest.raises(SleepsError):
            reader.dequeue(20)
        assert steps == [1, "sleep"]
        writer.enqueue(1)
        steps.clear()
        with pytest.raises(SleepsError):
            writer.enqueue(2, 20)
        assert steps == [1, "sleep"]


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
