import contextlib
import os
import pathlib
import signal
import stat
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from tcomm.config import TIMEOUT_PROFILES
from tcomm.errors import (
    CapabilityError,
    CommError,
    ConfigError,
    DecodeError,
    DuplicateRankError,
    GroupClosedError,
    PeerLostError,
    PeerTimeoutError,
    QueueFullError,
    RendezvousError,
)
from tcomm.groups.queue.handle import Handle
from tcomm.groups.queue.message_queue import MessageQueue
from tcomm.groups.queue.ring import LINE, Word
from tcomm.groups.stateless.group import StatelessProcessGroup
from tcomm.objects.codec import decode, encode
from tests.groups.queue.peers import from_rank_0, pair


def test_every_reader_gets_every_message_in_order():
    with pair(2, chunks=8) as (writer, *readers):
        given = [None, {"a": (1, 2.5)}, torch.arange(3), b"x" * 5000, "text"]
        for value in given:
            writer.enqueue(value)
        for reader in readers:
            got = [reader.dequeue(5) for _ in given]
            assert got[:2] == given[:2]
            assert torch.equal(got[2], given[2])
            assert got[3:] == given[3:]


def test_broadcast_object_returns_the_writers_object():
    with pair() as (writer, reader):
        value = {"a": 1}
        assert writer.broadcast_object(value) is value
        assert reader.broadcast_object() == value


def test_the_file_is_private_and_has_no_name_once_all_have_opened_it():
    writer = MessageQueue(1, 1, None, 4096, 2)
    path = pathlib.Path(writer.export_handle().buffer_handle[3])
    status = path.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_blocks * 512 >= status.st_size) == (0o600, True)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    assert path.exists()
    writer.wait_until_ready(5)
    assert not path.exists()
    reader.wait_until_ready(5)
    for queue in (reader, writer, writer):
        queue.shutdown()
    unread = MessageQueue(1, 1, None, 4096, 2)
    path = pathlib.Path(unread.export_handle().buffer_handle[3])
    del unread
    assert not path.exists()


def test_a_handle_travels_and_says_what_a_reader_needs():
    with pair(2, 4096, 3) as (writer, *_):
        handle = writer.export_handle()
        assert decode(encode(handle).join()) == handle
        assert handle.buffer_handle[:3] == (2, 4096, 3)
        assert (handle.local_reader_ranks, handle.local_subscribe_addr) == ([0, 1], None)
        assert (handle.remote_subscribe_addr, handle.remote_addr_ipv6) == (None, False)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((1, 2), "2 local of 1 readers"),
        ((2, 2, [5]), r"with local ranks \[5\]"),
        ((2, 2, [5, 5]), r"with local ranks \[5, 5\]; give each local reader a rank of its own"),
        ((1, 1, None, 0), "max_chunk_bytes=0"),
        ((1, 1, None, 64, 0), "max_chunks=0"),
        ((1, 1, None, 1 << 40, 2), "larger than any memory"),
        ((1, 0, None, 64, 2, "192.0.2.1"), "TCOMM_SECRET"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, told):
    with pytest.raises(ConfigError, match=told):
        MessageQueue(*arguments)


def test_no_memory_is_an_error_that_says_how_much(monkeypatch, tmp_path):
    monkeypatch.setenv("TCOMM_SHM_DIR", str(tmp_path / "none"))
    with pytest.raises(CapabilityError, match=r"needed \d+ bytes in .*none, available unknown"):
        MessageQueue(1, 1)


def test_only_a_writer_writes_and_only_a_reader_reads():
    with pair() as (writer, reader):
        for call, told in [
            (lambda: reader.enqueue(1), "Only writers can enqueue"),
            (writer.dequeue, "Only readers can dequeue"),
            (lambda: reader.acquire_write().__enter__(), "Only writers can acquire write"),
            (lambda: writer.acquire_read().__enter__(), "Only readers can acquire read"),
            (lambda: writer.borrow().__enter__(), "Only readers can dequeue"),
            (lambda: MessageQueue.create_from_handle(writer.export_handle(), 7), "rank 7 is none of"),
            (lambda: reader.dequeue("soon"), "neither seconds nor"),
        ]:
            with pytest.raises(ConfigError, match=told):
                call()
        with pytest.raises(ConfigError, match=r"value\['f'\]"):
            writer.enqueue({"f": print})
        writer.enqueue("still")
        assert reader.dequeue(5) == "still"


def test_a_rank_opens_a_queue_once():
    writer = MessageQueue(1, 1, [3], 4096, 2)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 3)
    with pytest.raises(DuplicateRankError, match=f"rank 3 of the queue is taken by pid {os.getpid()}"):
        MessageQueue.create_from_handle(writer.export_handle(), 3)
    reader.shutdown(), writer.shutdown()


def test_a_ring_that_is_gone_or_another_is_refused(tmp_path):
    with pytest.raises(RendezvousError, match="its writer must live"):
        MessageQueue.create_from_handle(Handle([0], (1, 64, 2, str(tmp_path / "gone"))), 0)
    other = tmp_path / "other"
    other.write_bytes(bytes(1 << 16))
    with pytest.raises(RendezvousError, match="is no ring of 1 readers and 2 x 64 bytes"):
        MessageQueue.create_from_handle(Handle([0], (1, 64, 2, str(other))), 0)


def test_raw_slots_are_released_also_when_the_block_raises():
    with pair(chunk_bytes=64, chunks=2) as (writer, reader):
        with contextlib.suppress(ZeroDivisionError), writer.acquire_write(5):
            1 / 0  # noqa: B018
        for round_ in range(5):
            with writer.acquire_write(5) as slot:
                slot[:] = bytes([round_]) * 64
            with contextlib.suppress(ZeroDivisionError), reader.acquire_read(5) as slot:
                assert bytes(slot) == bytes([round_]) * 64
                1 / 0  # noqa: B018
        with pytest.raises(PeerTimeoutError, match="wrote nothing"), reader.acquire_read(0.05):
            pass


def test_a_borrowed_array_is_a_view_while_the_block_runs():
    with pair(chunks=10) as (writer, reader):
        for number in range(12):
            writer.enqueue(np.full(300, number))
            with reader.borrow(5) as value:
                slots = reader._receiver.source.ring.slots
                assert any(np.shares_memory(value, np.frombuffer(slot, np.uint8)) for slot in slots)
                assert value.tolist() == [number] * 300
        with pytest.raises(PeerTimeoutError), reader.borrow(0.05):
            pass
        writer.enqueue(torch.arange(4000))
        with contextlib.suppress(ZeroDivisionError), reader.borrow(5) as value:
            assert torch.equal(value, torch.arange(4000))
            1 / 0  # noqa: B018
        writer.enqueue("next")
        assert reader.dequeue(5) == "next"


def test_timeouts_cancel_and_shutdown_end_a_wait():
    with pair() as (writer, reader):
        began = time.monotonic()
        with pytest.raises(
            PeerTimeoutError, match=rf"pid {os.getpid()}.*wrote nothing within 0\.2 s"
        ) as caught:
            reader.dequeue(0.2)
        assert 0.2 <= time.monotonic() - began < 1.5
        assert (caught.value.op, caught.value.group) == ("dequeue", "queue")
        event = threading.Event()
        threading.Timer(0.15, event.set).start()
        began = time.monotonic()
        with pytest.raises(CommError, match=r"^cancelled$"):
            reader.dequeue(cancel=event, indefinite=True)
        assert time.monotonic() - began < 1.0
        threading.Timer(0.15, reader.shutdown).start()
        with pytest.raises(GroupClosedError, match="shut down"):
            reader.dequeue(20)
        with pytest.raises(GroupClosedError):
            reader.dequeue(20)
        with pytest.raises(PeerLostError, match=rf"rank 0 has left .pid {os.getpid()}"):
            _enqueue_times(writer, 6)


def _enqueue_times(writer, count):
    for _ in range(count):
        writer.enqueue(1, 5)


def test_a_shut_down_writer_wakes_readers_after_what_it_wrote():
    with pair(2) as (writer, first, second):
        writer.enqueue("last")
        assert first.dequeue(5) == "last"
        threading.Timer(0.15, writer.shutdown).start()
        began = time.monotonic()
        with pytest.raises(PeerLostError, match="shut the queue down"):
            first.dequeue(20)
        assert time.monotonic() - began < 2.0
        assert second.dequeue(5) == "last"
        with pytest.raises(GroupClosedError):
            writer.enqueue(1)


def test_a_blocked_writer_is_woken_by_its_own_shutdown_and_by_a_reader():
    with pair(chunks=2) as (writer, reader):
        writer.enqueue(1), writer.enqueue(2)
        threading.Timer(0.1, reader.dequeue).start()
        began = time.monotonic()
        writer.enqueue(3, 20)
        assert 0.05 < time.monotonic() - began < 2.0
        threading.Timer(0.1, writer.shutdown).start()
        with pytest.raises(GroupClosedError, match="shut down"):
            writer.enqueue(4, 20)


def test_no_timeout_means_the_profile_and_not_for_ever(monkeypatch):
    monkeypatch.setenv("TCOMM_TIMEOUT", "0.1")
    with pair(chunks=1) as (writer, reader):
        with pytest.raises(PeerTimeoutError, match=r"within 0\.1 s"):
            reader.dequeue()
        writer.enqueue(1)
        with pytest.raises(QueueFullError, match=r"stayed so for 0\.1 s"):
            writer.enqueue(2)
    assert TIMEOUT_PROFILES["default"] == 120.0


def test_readers_that_do_not_come_are_named():
    writer = MessageQueue(2, 2, [4, 6])
    reader = MessageQueue.create_from_handle(writer.export_handle(), 4)
    with pytest.raises(PeerTimeoutError, match=r"ranks 6 did not open the queue within 0\.1 s") as caught:
        writer.wait_until_ready(0.1)
    assert caught.value.peers == (6,)
    with pytest.raises(PeerTimeoutError, match="did not get all its readers"):
        reader.wait_until_ready(0.1)
    reader.shutdown(), writer.shutdown()


def test_a_queue_is_refused_in_a_forked_child_and_unharmed_by_it():
    with pair() as (writer, reader):
        pid = os.fork()
        if not pid:
            status = 1
            with contextlib.suppress(BaseException):
                try:
                    writer.enqueue(1)
                except GroupClosedError as error:
                    status = 0 if "belongs to the process that made it" in str(error) else 2
                writer.shutdown()
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        writer.enqueue("here")
        assert reader.dequeue(5) == "here"


def test_a_short_message_takes_the_short_way_and_only_when_it_is_the_next(monkeypatch):
    with pair(chunk_bytes=64, chunks=2) as (writer, reader):
        ring_writer, ring_reader = writer._sender.sides[0], reader._receiver.source
        with monkeypatch.context() as patched:
            patched.setattr(writer._sender, "send", None)
            patched.setattr(ring_reader, "look", None)
            for value in [1, {"a": [b"x"]}, "text"]:
                writer.enqueue(value)
                assert reader.dequeue(5) == value
        assert ring_reader.take() is None
        assert (ring_writer.put(b"\x07"), ring_writer.put(b"\x08"), ring_writer.put(b"\x09")) == (
            True,
            True,
            False,
        )
        assert bytes(ring_reader.take()) == b"\x07"
        assert (reader.dequeue(5), reader.dequeue(5)) == (7, 8)
        # The beginning of a message that its writer gave up, then another message.
        ring_writer.publish(64, 100, 0)
        with pytest.raises(PeerTimeoutError):
            reader.dequeue(0.01)
        writer.enqueue("other")
        assert reader.dequeue(5) == "other"
        assert not reader._receiver._assembler.is_open


def test_the_fence_works_also_after_a_signal_between_its_halves(monkeypatch):
    monkeypatch.setattr("tcomm.groups.queue.ring.can_be_ordered", lambda: False)
    with pair() as (writer, reader):
        for side in (writer._sender.sides[0], reader._receiver.source):
            side._fence.acquire()
        began = time.monotonic()
        writer.enqueue(1)
        assert reader.dequeue(5) == 1
        assert time.monotonic() - began < 1.0
        assert not writer._sender.sides[0]._fence.locked()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=6, max_size=6)
    | st.tuples(st.just(2), *[st.integers(-80, 80)] * 5),
    st.binary(max_size=64),
)
def test_random_bytes_in_a_slot_are_one_clear_error_and_nothing_after_it(words, data):
    with pair(chunk_bytes=64, chunks=2) as (writer, reader):
        writer.enqueue("before")
        assert reader.dequeue(5) == "before"
        writer.enqueue("damaged")
        ring = writer._sender.sides[0].ring
        line = ring.slots_begin + LINE
        for index, word in enumerate(words):
            ring.words[line + index] = word
        ring.slots[1][: len(data)] = data
        with contextlib.suppress(DecodeError, PeerTimeoutError):
            reader.dequeue(0.001)
        writer.enqueue("after")
        assert reader.dequeue(5) == "after"


def test_a_damaged_head_is_a_clear_error():
    with pair() as (_, reader):
        reader._receiver.source.ring.words[Word.HEAD] = -5
        with pytest.raises(CommError, match="the memory of the queue is damaged"):
            reader.dequeue(1)


def _count_cpu(member):
    queue = from_rank_0(member)
    if member.rank == 0:
        time.sleep(1.0)
        queue.enqueue(time.monotonic())
        member.meet("done")
        return 0.0, 0.0
    before = time.process_time()
    sent = queue.dequeue(20)
    late = time.monotonic() - sent
    used = time.process_time() - before
    member.meet("done")
    return used, late


def test_an_idle_reader_costs_no_core_and_wakes_at_once(on_ranks):
    used, late = on_ranks(2, _count_cpu)[1]
    assert used < 0.05
    assert late < 0.08


def _interrupted(member, number):
    queue = from_rank_0(member, chunks=1)
    if member.rank == 0:
        member.meet("interrupted")
        queue.enqueue("after")
        return None

    class InterruptedByTestError(Exception):
        pass

    def handler(*_):
        raise InterruptedByTestError(time.monotonic())

    signal.signal(number, handler)
    at = []

    def interrupt():
        time.sleep(0.4)
        at.append(time.monotonic())
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    with pytest.raises(InterruptedByTestError):
        queue.dequeue(20)
    late = time.monotonic() - at[0]
    member.meet("interrupted")
    assert queue.dequeue(20) == "after"
    return late


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_wait_and_loses_nothing(on_ranks, number):
    assert on_ranks(2, _interrupted, number)[1] < 0.1


def _arrays():
    generator = np.random.default_rng(7)
    return [generator.integers(0, 1 << 60, generator.integers(1, 10_000)) for _ in range(300)]


def _group_of(member, kind):
    if kind == "torch":
        member.process_group()
        return dist.group.WORLD
    return StatelessProcessGroup.create("127.0.0.1", 0, member.rank, member.world_size, via=member.store)


def _broadcast_arrays(member, kind):
    group = _group_of(member, kind)
    queue = MessageQueue.create_from_process_group(group, 40 * 1024, 2, writer_rank=2)
    assert (queue._sender is not None) == (member.rank == 2)
    equal = 0
    for number, array in enumerate(_arrays()):
        if number % 50 == member.rank:
            time.sleep(0.002)
        if member.rank == 2:
            queue.enqueue((number, array))
        else:
            got_number, got = queue.dequeue()
            equal += got_number == number and np.array_equal(got, array)
    member.meet("done")
    queue.shutdown()
    return equal


@pytest.mark.parametrize("kind", ["torch", "stateless"])
def test_random_arrays_reach_all_ranks_of_a_group_in_order(on_ranks, kind):
    assert on_ranks(4, _broadcast_arrays, kind) == [300, 300, 0, 300]


def _from_outside_and_to_one(member):
    member.process_group()
    pg = dist.group.WORLD
    outside = handle = None
    if member.rank == 1:
        outside = MessageQueue(member.world_size, member.world_size, None, 4096, 2)
        handle = outside.export_handle()
    inside = MessageQueue.create_from_process_group(
        pg, 4096, 2, writer_rank=1, external_writer_handle=handle, blocking=False
    )
    if outside is not None:
        outside.wait_until_ready(10)
        outside.enqueue("from outside")
    inside.wait_until_ready(10)
    got = inside.dequeue(10)
    mine, handles = MessageQueue.create_from_process_group_single_reader(pg, 4096, 2, reader_rank=1)
    readers = [MessageQueue.create_from_handle(handle, 0) for handle in handles]
    mine.wait_until_ready(10)
    mine.enqueue(member.rank)
    heard = [reader.dequeue(10) for reader in readers]
    member.meet("done")
    for queue in filter(None, (outside, inside, mine, *readers)):
        queue.shutdown()
    return got, heard


def test_a_writer_outside_the_group_and_a_queue_to_one_reader(on_ranks):
    assert on_ranks(2, _from_outside_and_to_one) == [("from outside", []), ("from outside", [0, 1])]


def _one_cannot(member):
    member.process_group()
    if member.rank == 1:
        os.environ["TCOMM_SHM_DIR"] = "/nowhere"
    with pytest.raises(RendezvousError, match=r"rank 1: CapabilityError: no memory for a queue"):
        MessageQueue.create_from_process_group_single_reader(dist.group.WORLD, 4096, 2)
    with pytest.raises(ConfigError, match="writer_rank"):
        MessageQueue.create_from_process_group(dist.group.WORLD, 4096, 2, writer_rank=-1)


def test_what_one_rank_cannot_is_everyones_error(on_ranks):
    on_ranks(2, _one_cannot)
