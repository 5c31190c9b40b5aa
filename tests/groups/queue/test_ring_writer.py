import concurrent.futures
import contextlib
import itertools
import threading
import time
import types

import numpy as np
import pytest

from tcomm.errors import PeerLostError, PeerTimeoutError
from tcomm.groups.queue import receiving, ring_writer
from tcomm.groups.queue.chunks import cut
from tcomm.groups.queue.message_queue import MessageQueue
from tcomm.groups.queue.patience import Patience
from tcomm.groups.queue.ring import PIECE_BYTES, Word
from tcomm.objects.codec import encode
from tests.groups.queue.peers import pair

LONG = 4 * PIECE_BYTES + 3


class InterruptedByTestError(Exception):
    pass


@contextlib.contextmanager
def between_pieces(monkeypatch, step):
    """Call `step(number)` before each piece of a message."""

    def cut_and_step(parts, nbytes):
        for number, piece in enumerate(cut(parts, nbytes)):
            step(number)
            yield piece

    with monkeypatch.context() as patched:
        patched.setattr(ring_writer, "cut", cut_and_step)
        yield


def _read_long(take, reader, timeout=5):
    """What `take` makes of the next message."""
    if take == "dequeue":
        return reader.dequeue(timeout)
    with getattr(reader, take)(timeout) as value:
        return bytes(value)


def test_readers_see_each_piece_of_a_long_message_when_it_is_written(monkeypatch):
    with pair(2, chunk_bytes=1 << 20, chunks=1) as (writer, *readers):
        rings, seen = [reader._receiver.source for reader in readers], []

        def look(number):
            for ring in rings:
                total, offset, chunk = ring.look()
                arrived = ring.wait_filled(None, first + number * PIECE_BYTES)
                seen.append((total, offset, arrived, bytes(chunk[:arrived]) in message))

        for round_ in range(2):
            seen.clear()
            value = np.arange(round_, LONG + round_, dtype=np.uint8)
            encoded = encode(value)
            message, first = encoded.join(), len(encoded.parts[0])
            assert encoded.nbytes > first + 4 * PIECE_BYTES
            with between_pieces(monkeypatch, look):
                writer.enqueue(value)
            # The first part is there when the number is, and then piece after piece.
            pieces = [(len(message), 0, first + number * PIECE_BYTES, True) for number in range(5)]
            assert seen == list(itertools.chain.from_iterable((piece, piece) for piece in pieces))
            assert all(reader.dequeue(5).tolist() == value.tolist() for reader in readers)


def test_a_long_message_that_is_all_head_has_its_number_before_its_first_byte(monkeypatch):
    value = [2**70 + number for number in range(3 * PIECE_BYTES // 12)]
    with pair(chunk_bytes=1 << 20) as (writer, reader):
        ring, there = reader._receiver.source, []
        (whole,) = encode(value).parts
        assert len(whole) > 2 * PIECE_BYTES
        with between_pieces(monkeypatch, lambda number: there.append(ring.wait_filled(None, 0))):
            writer.enqueue(value)
        assert there == list(range(0, len(whole), PIECE_BYTES))
        assert reader.dequeue(5) == value


def test_a_writer_whose_readers_keep_up_asks_for_room_only_behind_a_message(monkeypatch):
    with pair(2, chunks=3) as (writer, *readers):
        ring, given_out = writer._sender.sides[0], []
        give_out = ring._give_out

        def refuse():
            raise AssertionError("asked in front of a message")

        def count(number):
            give_out(number)
            given_out.append(ring.head)

        monkeypatch.setattr(ring, "has_room_now", refuse)
        monkeypatch.setattr(ring, "_give_out", count)
        for number in range(10):
            writer.enqueue(number)
            assert [reader.dequeue(5) for reader in readers] == [number, number]
        assert given_out == list(range(1, 11))


def test_a_long_slot_that_is_written_by_hand_follows_a_long_message():
    with pair(chunk_bytes=1 << 20, chunks=1) as (writer, reader):
        for round_ in range(2):
            writer.enqueue(value := bytes([round_]) * LONG)
            assert reader.dequeue(5) == value
            with writer.acquire_write(5) as slot:
                slot[:] = bytes([round_ + 9]) * len(slot)
            with reader.acquire_read(5) as chunk:
                assert bytes(chunk) == bytes([round_ + 9]) * (1 << 20)


@pytest.mark.parametrize("take", ["dequeue", "borrow", "acquire_read"])
def test_a_message_that_its_writer_did_not_finish_is_passed_over(monkeypatch, take):
    def interrupt(number):
        if number == 2:
            raise InterruptedByTestError

    with pair(chunk_bytes=1 << 20, chunks=2) as (writer, reader):
        for round_ in range(3):
            with between_pieces(monkeypatch, interrupt), pytest.raises(InterruptedByTestError):
                writer.enqueue(bytes(LONG))
            writer.enqueue(value := bytes([round_ + 1]) * LONG)
            got = _read_long(take, reader)
            assert (got[-LONG:] if take == "acquire_read" else got) == value
        with pytest.raises(PeerTimeoutError, match="wrote nothing"):
            reader.dequeue(0.01)


@pytest.mark.parametrize("take", ["dequeue", "borrow", "acquire_read"])
def test_a_message_that_one_reader_may_have_taken_is_not_taken_back(monkeypatch, take):
    value, got = bytes(range(256)) * (LONG // 256), []

    def cut_and_interrupt(parts, nbytes):
        yield from cut(parts, nbytes)
        got.append(_read_long(take, first)[-len(value) :])
        raise InterruptedByTestError

    with pair(2, chunk_bytes=len(encode(value).join())) as (writer, first, second):
        with monkeypatch.context() as patched:
            patched.setattr(ring_writer, "cut", cut_and_interrupt)
            with pytest.raises(InterruptedByTestError):
                writer.enqueue(value)
        got.append(_read_long(take, second, 1)[-len(value) :])
        assert got == [value, value]


@pytest.mark.parametrize("take", ["dequeue", "borrow", "acquire_read"])
def test_messages_that_are_passed_over_take_of_one_patience(monkeypatch, take):
    made, interrupted, value = [], itertools.count(), bytes([7]) * LONG

    def interrupt(number):
        if number == 2 and next(interrupted) < 3:
            # Longer than a reader polls.
            time.sleep(0.02)
            raise InterruptedByTestError

    def make_patience(*args):
        made.append(Patience(*args))
        return made[-1]

    def write():
        for _ in range(3):
            with pytest.raises(InterruptedByTestError):
                writer.enqueue(bytes(LONG))
        writer.enqueue(value)

    monkeypatch.setattr(receiving, "Patience", make_patience)
    with (
        pair(chunk_bytes=1 << 20, chunks=4) as (writer, reader),
        between_pieces(monkeypatch, interrupt),
        concurrent.futures.ThreadPoolExecutor() as threads,
    ):
        writing = threads.submit(write)
        assert _read_long(take, reader)[-LONG:] == value
        writing.result(20)
    assert len(made) == 1


@pytest.mark.parametrize("take", ["dequeue", "borrow", "acquire_read"])
def test_a_writer_that_stops_in_a_message_is_named_and_the_message_comes_whole_later(monkeypatch, take):
    has_begun, go_on = threading.Event(), threading.Event()
    value = bytes(range(256)) * (LONG // 256)

    def stop(number):
        if number == 2:
            has_begun.set()
            assert go_on.wait(20)

    with pair(chunk_bytes=1 << 20) as (writer, reader), between_pieces(monkeypatch, stop):
        thread = threading.Thread(target=writer.enqueue, args=(value,))
        thread.start()
        assert has_begun.wait(20)
        for _ in range(2):
            with pytest.raises(PeerTimeoutError, match=r"stopped in the middle of a message within 0\.05 s"):
                _read_long(take, reader, 0.05)
        go_on.set()
        assert _read_long(take, reader)[-len(value) :] == value
        thread.join(20)


def test_long_messages_share_memory_only_when_all_readers_have_passed_the_last_one():
    with pair(2, chunk_bytes=1 << 20) as (writer, first, second):
        rings = [reader._receiver.source for reader in (first, second)]

        def send(number):
            writer.enqueue(np.full(LONG, number, np.uint8))

        def is_shared(ring):
            return np.shares_memory(ring.look()[2], np.frombuffer(ring.ring.shared, np.uint8))

        send(1)
        assert [is_shared(ring) for ring in rings] == [True, True]
        assert first.dequeue(5)[-1] == 1
        send(2)
        assert not is_shared(rings[0])
        with second.borrow(5) as value:
            send(3)
            assert (value == 1).all()
        for reader, numbers in ((first, (2, 3)), (second, (2, 3))):
            assert [set(reader.dequeue(5).tolist()) for _ in numbers] == [{number} for number in numbers]
        send(4)
        assert [is_shared(ring) for ring in rings] == [True, True]


def test_a_message_longer_than_the_shared_memory_lies_in_its_slot():
    with pair(chunk_bytes=3 << 20, chunks=2) as (writer, reader):
        writer.enqueue(value := np.arange(3 << 17)[: (3 << 17) - 99])
        assert len(reader._receiver.source.ring.shared) == 2 << 20
        assert reader.dequeue(5).tolist() == value.tolist()


def test_there_is_no_shared_memory_where_no_message_is_long():
    with pair(chunk_bytes=PIECE_BYTES) as (writer, reader):
        assert len(reader._receiver.source.ring.shared) == 0
        writer.enqueue(value := bytes(PIECE_BYTES - 99))
        assert reader.dequeue(5) == value


def test_a_reader_may_leave_with_the_last_message_and_is_missed_at_the_next(monkeypatch):
    with pair(2) as (writer, first, second):
        ring, taken = writer._sender.sides[0], []
        give_out = ring._give_out

        def give_out_and_let_the_first_leave(number):
            give_out(number)
            ring._looked = 0.0
            if not taken:
                taken.append(first.dequeue(5))
                first.shutdown()

        monkeypatch.setattr(ring, "_give_out", give_out_and_let_the_first_leave)
        writer.enqueue("last")
        assert (taken, second.dequeue(5)) == (["last"], "last")
        # What takes the long way is not begun, in one chunk or several.
        for value in (np.arange(3), b"long" * 2000):
            ring._looked = 0.0
            with pytest.raises(PeerLostError, match="the reader of rank 0 has left"):
                writer.enqueue(value)
        with pytest.raises(PeerLostError, match="the reader of rank 0 has left"):
            writer.enqueue("next")
        assert second.dequeue(5) == "next"
        with pytest.raises(PeerTimeoutError):
            second.dequeue(0.05)


def test_nobody_looks_at_a_clock_before_a_short_message_is_out(monkeypatch):
    with pair() as (writer, reader):
        words, looks = reader._receiver.source.ring.words, []
        clock = types.SimpleNamespace(monotonic=lambda: looks.append(words[Word.HEAD]) or time.monotonic())
        monkeypatch.setattr(ring_writer, "time", clock)
        writer.enqueue("short")
        assert looks == [1]
        assert reader.dequeue(5) == "short"


def test_one_who_left_with_the_last_message_hides_nobody_who_left_without_it(monkeypatch):
    with pair(2) as (writer, first, second):
        ring = writer._sender.sides[0]
        give_out = ring._give_out

        def give_out_and_let_both_leave(number):
            give_out(number)
            ring._looked = 0.0
            assert first.dequeue(5) == "last"
            first.shutdown()
            second.shutdown()

        monkeypatch.setattr(ring, "_give_out", give_out_and_let_both_leave)
        with pytest.raises(PeerLostError, match="the reader of rank 1 has left"):
            writer.enqueue("last")


def test_who_left_with_all_messages_is_missed_beside_one_that_lags():
    with pair(2, chunks=2) as (writer, first, _second):
        writer.enqueue(1)
        writer.enqueue(2)
        assert [first.dequeue(5), first.dequeue(5)] == [1, 2]
        first.shutdown()
        with pytest.raises(PeerLostError, match="the reader of rank 0 has left"):
            writer.enqueue(3, timeout=5)


def test_who_leaves_before_all_have_come_is_missed():
    writer = MessageQueue(1, 1, None, 64, 2)
    with contextlib.closing(types.SimpleNamespace(close=writer.shutdown)):
        MessageQueue.create_from_handle(writer.export_handle(), 0).shutdown()
        with pytest.raises(PeerLostError, match="the reader of rank 0 has left"):
            writer.wait_until_ready(5)


def test_a_long_plain_message_is_whole_also_where_its_reader_waited_for_it(monkeypatch):
    before, message = [0] * 100_000, [1] * 100_000
    with pair(chunk_bytes=1 << 20, chunks=2) as (writer, reader), contextlib.ExitStack() as stack:
        writer.enqueue(before)
        assert reader.dequeue(5) == before
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
        coming = pool.submit(reader.dequeue, 5)

        def give_the_reader_time(_number):
            time.sleep(0.1)

        with between_pieces(monkeypatch, give_the_reader_time):
            writer.enqueue(message)
        assert coming.result() == message
