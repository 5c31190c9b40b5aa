import contextlib
import gc
import signal
import threading
import weakref

import numpy as np
import pytest

from tcomm.errors import ConfigError, PeerTimeoutError, UsageError
from tcomm.groups.queue import receiving
from tcomm.groups.queue.message_queue import MessageQueue
from tcomm.objects import codec
from tests.groups.queue.peers import pair
from tests.objects.handling import handling

BORROWED = "is borrowed; end the block of borrow or acquire_read"


@pytest.mark.parametrize("take", ["dequeue", "borrow", "acquire_read"])
@pytest.mark.parametrize("keep", ["borrow", "acquire_read"])
def test_nothing_else_is_read_while_a_message_is_borrowed(keep, take):
    with pair(chunk_bytes=64, chunks=16) as (writer, reader):
        for number in range(3):
            writer.enqueue(number)
        with contextlib.ExitStack() as block:
            block.enter_context(getattr(reader, keep)(5))
            with pytest.raises(UsageError, match=BORROWED):
                getattr(block, "enter_context" if take != "dequeue" else "callback")(getattr(reader, take)(5))
        assert [reader.dequeue(5), reader.dequeue(5)] == [1, 2]
        # A message of several chunks is in no slot.
        writer.enqueue(np.arange(20))
        writer.enqueue("next")
        with reader.borrow(5) as value:
            assert reader.dequeue(5) == "next"
            assert value.tolist() == list(range(20))


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "soon"])
def test_a_timeout_that_makes_no_sense_is_refused_also_where_nothing_is_waited_for(timeout):
    with pair() as (writer, reader):
        writer.enqueue("first")
        for call in (
            lambda: reader.dequeue(timeout),
            lambda: reader.borrow(timeout).__enter__(),
            lambda: reader.acquire_read(timeout).__enter__(),
            lambda: writer.enqueue("short", timeout),
            lambda: writer.enqueue(np.arange(2), timeout),
            lambda: writer.enqueue(np.arange(9999), timeout),
            lambda: writer.acquire_write(timeout).__enter__(),
        ):
            with pytest.raises(ConfigError, match=f"timeout {timeout!r} is "):
                call()
        writer.enqueue("second", 5)
        assert [reader.dequeue(5), reader.dequeue(5)] == ["first", "second"]


class InterruptedByTestError(BaseException):
    pass


def test_a_call_that_is_interrupted_before_any_release_loses_nothing(monkeypatch):
    with pair(chunk_bytes=256, chunks=32) as (writer, reader):
        source, interrupted = reader._receiver.source, []
        release = source.release

        def release_at_the_second_time():
            if len(interrupted) <= 2 * source.taken:
                interrupted.extend([True, True])
                raise InterruptedByTestError
            release()

        monkeypatch.setattr(source, "release", release_at_the_second_time)
        for value in [1, np.arange(300), np.arange(3), np.arange(310)]:
            writer.enqueue(value)
        got = []
        while len(got) < 4:
            with contextlib.suppress(InterruptedByTestError):
                got.append(reader.dequeue(5))
    assert len(interrupted) == 2 * source.taken > 20
    assert got[0] == 1
    assert [value.tolist() for value in got[1:]] == [list(range(count)) for count in (300, 3, 310)]


@pytest.mark.parametrize("chunk_bytes", [256, 1 << 20])
def test_a_call_that_is_interrupted_after_a_release_loses_nothing(monkeypatch, chunk_bytes):
    with pair(chunk_bytes=chunk_bytes, chunks=1024) as (writer, reader):
        source, interrupted = reader._receiver.source, []
        release = source.release

        def release_and_be_interrupted():
            release()
            interrupted.append(True)
            raise InterruptedByTestError

        monkeypatch.setattr(source, "release", release_and_be_interrupted)
        values = [np.arange(count) for count in (3, 300, 310, 9999, 3)]
        for value in values:
            writer.enqueue(value)
        got = []
        while len(got) < len(values):
            with contextlib.suppress(InterruptedByTestError):
                got.append(reader.dequeue(5))
            if len(got) == 2:
                with contextlib.suppress(InterruptedByTestError), reader.borrow(5) as value:
                    got.append(value.copy())
    assert len(interrupted) == source.taken >= 5
    assert [value.tolist() for value in got] == [value.tolist() for value in values]


@pytest.mark.parametrize("chunk_bytes", [256, 1 << 20])
def test_a_borrow_that_is_interrupted_while_it_decodes_keeps_nothing_and_loses_nothing(
    monkeypatch, chunk_bytes
):
    def interrupt(*_):
        raise InterruptedByTestError

    with pair(chunk_bytes=chunk_bytes, chunks=16) as (writer, reader):
        writer.enqueue(np.arange(99))
        for take in ("borrow", "dequeue"):
            with monkeypatch.context() as patched:
                patched.setattr(codec, "_decode_structure", interrupt)
                with pytest.raises(InterruptedByTestError):
                    _take(reader, take)
        assert reader.dequeue(5).tolist() == list(range(99))


@pytest.mark.parametrize("value", [bytes(100_000), np.zeros(20_000), {"data": bytes(100_000)}])
def test_a_reader_rehearses_once_behind_a_long_message_and_only_when_nothing_has_come(monkeypatch, value):
    rehearsed = []
    monkeypatch.setattr(receiving, "rehearse", lambda: rehearsed.append(True))
    with pair(chunk_bytes=1 << 20, chunks=4) as (writer, reader):

        def times(*values):
            rehearsed.clear()
            for value in values:
                writer.enqueue(value)
            for _ in values:
                reader.dequeue(5)
            for _ in range(2):
                with pytest.raises(PeerTimeoutError):
                    reader.dequeue(0.01)
            return len(rehearsed)

        assert [times(), times(1), times(value), times(value, 1), times(1, value)] == [0, 0, 1, 0, 1]


@pytest.mark.parametrize("take", ["borrow", "acquire_read", "dequeue"])
def test_each_call_has_a_patience_of_its_own(take):
    with pair() as (writer, reader):
        with pytest.raises(PeerTimeoutError, match=r"within 0\.05 s"):
            _take(reader, take, 0.05)
        late = threading.Timer(0.3, writer.enqueue, [1])
        late.start()
        assert _take(reader, take, 5) in (1, b"\x01")
        late.join()


def test_the_memory_of_both_sides_goes_with_their_last_references():
    writer = MessageQueue(1, 1, None, 1 << 20, 4)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    writer.wait_until_ready(5)
    reader.wait_until_ready(5)
    for value in ("short", bytes(100_000)):
        writer.enqueue(value)
        assert reader.dequeue(5) == value
    rings = [weakref.ref(side.ring) for side in (writer._sender.sides[0], reader._receiver.source)]
    gc.disable()
    try:
        for queue in (writer, reader):
            queue.shutdown()
        del queue, writer, reader
        assert [ring() for ring in rings] == [None, None]
    finally:
        gc.enable()


def _time_out(*_):
    raise TimeoutError("of the caller")


@pytest.mark.parametrize("value", [np.arange(9), bytes(100_000)])
@pytest.mark.parametrize("take", ["borrow", "dequeue"])
def test_a_caller_whose_signal_comes_while_a_message_is_decoded_gets_it_at_the_next_call(
    monkeypatch, value, take
):
    inner = codec._decode_structure

    def interrupted(*args):
        inner(*args)
        signal.raise_signal(signal.SIGALRM)

    with pair(chunk_bytes=1 << 20) as (writer, reader), handling(signal.SIGALRM, _time_out):
        writer.enqueue([value])
        with monkeypatch.context() as patched:
            patched.setattr(codec, "_decode_structure", interrupted)
            with pytest.raises(TimeoutError, match="of the caller"):
                _take(reader, take)
        assert bytes(reader.dequeue(5)[0]) == bytes(value)


def _interrupted_after(call):
    def called(*args):
        call(*args)
        raise InterruptedByTestError

    return called


def _take(reader, take, timeout=5):
    if take == "dequeue":
        return reader.dequeue(timeout)
    with getattr(reader, take)(timeout) as value:
        return bytes(value) if take == "acquire_read" else value


def test_a_call_that_is_interrupted_when_it_has_its_slot_keeps_no_slot(monkeypatch):
    with pair() as (writer, reader):
        sender, receiver = writer._sender, reader._receiver
        with monkeypatch.context() as patched:
            patched.setattr(sender, "slot", _interrupted_after(sender.slot))
            with pytest.raises(InterruptedByTestError), writer.acquire_write(5):
                pass
        writer.enqueue("first")
        with monkeypatch.context() as patched:
            patched.setattr(receiver, "next_chunk", _interrupted_after(receiver.next_chunk))
            with pytest.raises(InterruptedByTestError), reader.acquire_read(5):
                pass
        assert reader.dequeue(5) == "first"


@pytest.mark.parametrize("chunk_bytes", [256, 1 << 20])
@pytest.mark.parametrize("then", ["borrow", "dequeue"])
def test_a_borrow_that_is_interrupted_when_it_has_its_message_loses_none(monkeypatch, chunk_bytes, then):
    with pair(chunk_bytes=chunk_bytes, chunks=16) as (writer, reader):
        values = [np.arange(count) for count in (99, 98, 97)]
        for value in values:
            writer.enqueue(value)
        receiver = reader._receiver
        with monkeypatch.context() as patched:
            patched.setattr(receiver, "next_borrowed", _interrupted_after(receiver.next_borrowed))
            for _ in range(3):
                with pytest.raises(InterruptedByTestError), reader.borrow(5):
                    pass
        assert [_take(reader, take).size for take in (then, "borrow", "dequeue")] == [99, 98, 97]


def test_what_an_interrupted_call_left_outlives_a_read_by_hand(monkeypatch):
    with pair(chunk_bytes=256, chunks=16) as (writer, reader):
        for value in (np.arange(99), 5):
            writer.enqueue(value)
        receiver = reader._receiver
        with monkeypatch.context() as patched:
            patched.setattr(receiver, "next_borrowed", _interrupted_after(receiver.next_borrowed))
            with pytest.raises(InterruptedByTestError), reader.borrow(5):
                pass
        with reader.acquire_read(5) as chunk:
            assert bytes(chunk) == b"\x05"
        assert reader.dequeue(5).size == 99


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("take", ["borrow", "acquire_read"])
def test_a_block_that_is_interrupted_at_its_end_gives_its_slot_back_once(monkeypatch, take, when):
    with pair() as (writer, reader):
        source, interrupts = reader._receiver.source, [True]
        release = source.release

        def release_and_be_interrupted_once():
            if when == "after":
                release()
            if interrupts and interrupts.pop():
                raise InterruptedByTestError
            if when == "before":
                release()

        for value in ("first", "second"):
            writer.enqueue(value)
        monkeypatch.setattr(source, "release", release_and_be_interrupted_once)
        with pytest.raises(InterruptedByTestError):
            _take(reader, take)
        assert reader.dequeue(5) == "second"
