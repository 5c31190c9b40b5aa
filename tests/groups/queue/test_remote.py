import os
import signal
import threading
import time

import pytest
import torch

from tcomm.errors import (
    CommError,
    ConfigError,
    DecodeError,
    GroupClosedError,
    PeerLostError,
    PeerTimeoutError,
    QueueFullError,
    RendezvousError,
)
from tcomm.groups.queue.handle import Handle
from tcomm.groups.queue.message_queue import MessageQueue
from tcomm.groups.queue.patience import Patience
from tcomm.groups.queue.remote import RemoteReader, RemoteReaders, parse_url
from tcomm.objects.codec import Encoded, decode, encode
from tests.faults.worlds import failure_of


def _mixed(member, fn, *args, **options):
    """Rank 0 writes, rank 1 reads by the ring and the others by connections."""
    if member.rank == 0:
        queue = MessageQueue(member.world_size - 1, 1, [1], 4096, 4, **options)
        member.store.set("handle", encode(queue.export_handle()).join())
    else:
        queue = MessageQueue.create_from_handle(decode(member.store.get("handle")), member.rank)
    queue.wait_until_ready(20)
    value = fn(member, queue, *args)
    member.meet("done")
    queue.shutdown()
    return value


def _pass_all_kinds(member, queue):
    given = ["small", {"x": torch.arange(100_000)}, b"y" * 70_000, list(range(50))]
    if member.rank == 0:
        assert queue.export_handle().remote_subscribe_addr.startswith("tcp://127.0.0.1:")
        for value in given * 3:
            queue.enqueue(value, 20)
        with queue.acquire_write(20) as slot:
            slot[:5] = b"bytes"
        return None
    assert isinstance(queue._receiver.source, RemoteReader) == (member.rank == 2)
    for value in given * 3:
        got = queue.dequeue(20)
        if isinstance(value, dict):
            assert torch.equal(got["x"], value["x"])
        else:
            assert got == value
    with queue.acquire_read(20) as slot:
        assert bytes(slot[:5]) == b"bytes"
    with pytest.raises(PeerTimeoutError, match=r"wrote nothing within 0\.1 s"):
        queue.dequeue(0.1)
    return True


def test_local_and_remote_readers_get_the_same(on_ranks):
    assert on_ranks(3, _mixed, _pass_all_kinds) == [None, True, True]


def test_a_lagging_remote_reader_is_named_and_nothing_is_lost(on_ranks):
    sent, first, second = on_ranks(3, _mixed, _lag)
    assert sent > 0
    assert first == second == list(range(sent))


def _enqueue_counted(queue, sent):
    for number in range(100):
        queue.enqueue(bytes(3000) + bytes([number]), 0.3)
        sent.append(number)


def _dequeue_into(queue, got):
    while True:
        got.append(queue.dequeue(20))


def _lag(member, queue):
    if member.rank == 0:
        with pytest.raises(
            QueueFullError, match=r"remote reader of rank 2 .pid \d+ on .*chunks behind"
        ) as caught:
            _enqueue_counted(queue, count := [])
        assert caught.value.peers == (2,)
        assert failure_of(queue.enqueue, bytes(400_000), 0.3).kind == "QueueFullError"
        member.store.set("go", b"1")
        queue.enqueue("end", 20)
        return len(count)
    if member.rank == 2:
        member.store.get("go")
    got = []
    while (value := queue.dequeue(20)) != "end":
        got.append(value[-1])
    return got


def _die(member, drop):
    if member.rank == 0:
        queue = MessageQueue(2, 1, [1], 4096, 4, drop_dead_readers=drop)
        member.store.set("handle", encode(queue.export_handle()).join())
        queue.wait_until_ready(20)
        began = time.monotonic()
        error = None
        for number in range(30):
            try:
                queue.enqueue(number, 5)
            except PeerLostError as caught:
                error = caught
                break
            time.sleep(0.02)
        queue.shutdown()
        return (str(error), error.peers, time.monotonic() - began) if error else "all sent"
    queue = MessageQueue.create_from_handle(decode(member.store.get("handle")), member.rank)
    queue.wait_until_ready(20)
    if member.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    got = []
    with pytest.raises(PeerLostError, match="shut the queue down"):
        _dequeue_into(queue, got)
    return got


@pytest.mark.parametrize("drop", [False, True])
def test_a_dead_remote_reader_is_named_or_dropped(on_ranks, drop):
    writer, reader, _ = on_ranks(3, _die, drop, check=False)
    assert not writer.error, writer.error
    assert not reader.error, reader.error
    if drop:
        assert (writer.value, reader.value) == ("all sent", list(range(30)))
    else:
        told, peers, seconds = writer.value
        assert "the remote reader of rank 2 (pid" in told
        assert peers == (2,)
        assert seconds < 2.0


def _writer_dies(member):
    if member.rank == 0:
        queue = MessageQueue(1, 0, None, 4096, 4)
        member.store.set("handle", encode(queue.export_handle()).join())
        queue.wait_until_ready(20)
        queue.enqueue("last")
        os.kill(os.getpid(), signal.SIGKILL)
    queue = MessageQueue.create_from_handle(decode(member.store.get("handle")), 0)
    with pytest.raises(CommError, match=r"call wait_until_ready"):
        queue.dequeue(1)
    queue.wait_until_ready(20)
    assert queue.dequeue(20) == "last"
    failure = failure_of(queue.dequeue, 20)
    queue.shutdown()
    return failure


def test_a_remote_reader_names_its_lost_writer(on_ranks):
    failure = on_ranks(2, _writer_dies, check=False)[1].value
    assert failure.kind == "PeerLostError"
    assert "the writer (127.0.0.1:" in failure.text
    assert failure.seconds < 2.0


def test_an_address_is_parsed_or_refused():
    assert parse_url("tcp://127.0.0.1:29500") == ("127.0.0.1", 29500)
    assert parse_url("tcp://[::1]:1") == ("::1", 1)
    for url in (
        "tcp://nonsense",
        "tcp://:5",
        "tcp://host:",
        "tcp://host:0",
        "tcp://host:65536",
        "tcp://h:-1",
        "",
    ):
        with pytest.raises(ConfigError, match="is no address of a queue, such as tcp://"):
            MessageQueue.create_from_handle(Handle([], None, None, url), 0)


def test_nothing_is_sent_to_readers_that_were_not_waited_for():
    writer = MessageQueue(1, 0, None, 64, 2)
    for value in (1, bytes(1000)):
        with pytest.raises(CommError, match="call wait_until_ready before the first message"):
            writer.enqueue(value, 1)
    with pytest.raises(CommError, match="call wait_until_ready"), writer.acquire_write(1):
        pass
    writer.shutdown()


def test_closed_sides_wait_for_nobody_and_a_reader_that_left_is_told():
    closed = RemoteReaders("127.0.0.1", 1, 2, False)
    closed.close()
    for call in (closed.refuse_closed, closed.has_room, lambda: closed.wait_until_open(Patience(5, None))):
        with pytest.raises(GroupClosedError, match="shut down"):
            call()
    writer = MessageQueue(1, 0, None, 4096, 4)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    ready = threading.Thread(target=reader.wait_until_ready, args=(20,))
    ready.start()
    writer.wait_until_ready(20)
    ready.join()
    reader._receiver.source.close()
    reader.shutdown()
    with pytest.raises(GroupClosedError):
        reader._receiver.source.has_chunk()
    with pytest.raises(PeerLostError, match=f"the remote reader of rank 0 .pid {os.getpid()} on "):
        _enqueue_times(writer, 100)
    writer.shutdown()


def test_a_writer_waits_until_a_remote_reader_has_room():
    writer = MessageQueue(1, 0, None, 4096, 2)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    got = []

    def read_late():
        reader.wait_until_ready(20)
        time.sleep(0.2)
        got.extend(reader.dequeue(20) for _ in range(6))

    thread = threading.Thread(target=read_late)
    thread.start()
    writer.wait_until_ready(20)
    began = time.monotonic()
    for number in range(6):
        writer.enqueue(number, 20)
    waited = time.monotonic() - began
    thread.join()
    writer.shutdown()
    reader.shutdown()
    assert got == [*range(6)]
    assert waited > 0.1


def _enqueue_times(queue, count):
    for _ in range(count):
        queue.enqueue(1, 5)


def test_nobody_at_the_address_and_nobody_who_comes():
    writer = MessageQueue(1, 0)
    handle = writer.export_handle()
    with pytest.raises(PeerTimeoutError, match=r"1 of 1 remote readers did not connect to 127\.0\.0\.1:"):
        writer.wait_until_ready(0.2)
    writer.shutdown()
    reader = MessageQueue.create_from_handle(handle, 0)
    with pytest.raises(RendezvousError, match="no listener"):
        reader.wait_until_ready(0.3)


def test_a_chunk_that_is_none_is_an_error():
    reader = RemoteReader("127.0.0.1", 1, 0)
    reader._frame = bytearray(3)
    with pytest.raises(DecodeError, match="a chunk came in 3 bytes"):
        reader.look()


def _pass_what_may_not_travel(member, queue):
    if member.rank == 0:
        # A dict with a key of bytes, which no writer of this library makes.
        queue._sender.send(Encoded([b"\x81\xc4\x01a\x01"], 5), 20)
        queue.enqueue("next", 20)
        return None
    if member.rank == 2:
        with pytest.raises(DecodeError, match="of a type that may not travel"):
            queue.dequeue(20)
    else:
        queue.dequeue(20)
    return queue.dequeue(20)


def test_types_are_checked_again_of_what_comes_from_elsewhere(on_ranks):
    assert on_ranks(3, _mixed, _pass_what_may_not_travel)[1:] == ["next", "next"]
