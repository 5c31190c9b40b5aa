import os
import signal
import time

import numpy as np
import pytest

from tcomm.groups.queue import ring_writer
from tcomm.groups.queue.ring_writer import RingWriter
from tests.faults.worlds import failure_of
from tests.groups.queue.peers import from_rank_0


def _dies_writing(member, where):
    queue = from_rank_0(member, chunk_bytes=1 << 20 if where == "piece" else 4096, chunks=2)
    if member.rank == 0:
        queue.enqueue("whole")
        give_out, cut, count = RingWriter._give_out, ring_writer.cut, []

        def stop(writer, *args):
            count.append(1)
            if where == "slot" or len(count) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            give_out(writer, *args)

        def cut_off(parts, nbytes):
            yield next(cut(parts, nbytes))
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)

        if where == "piece":
            ring_writer.cut = cut_off
        else:
            RingWriter._give_out = stop
        queue.enqueue("never" if where == "slot" else np.arange(50000), 20)
    assert queue.dequeue(20) == "whole"
    failure = failure_of(queue.dequeue, 20)
    again = failure_of(queue.dequeue, 20)
    queue.shutdown()
    return failure, again


@pytest.mark.parametrize("where", ["slot", "chunk", "piece"])
def test_f22_readers_of_a_writer_killed_in_a_message_never_see_a_part_and_name_it(world, where):
    outcomes = world(3, _dies_writing, where, check=False)
    assert outcomes[0].exitcode == -signal.SIGKILL
    for outcome in outcomes[1:]:
        assert not outcome.error, outcome.error
        failure, again = outcome.value
        assert failure.kind == again.kind == "PeerLostError"
        assert failure.text.startswith("the writer (pid ")
        assert "died" in failure.text
        assert failure.seconds < 2.0
        assert again.seconds < 0.5


def _dies_before_all_are_there(member):
    from tcomm.groups.queue.message_queue import MessageQueue
    from tcomm.objects.codec import decode, encode

    if member.rank == 0:
        queue = MessageQueue(2, 2, None, 4096, 2)
        member.store.set("handle", encode(queue.export_handle()).join())
        member.store.get("open")
        os.kill(os.getpid(), signal.SIGKILL)
    queue = MessageQueue.create_from_handle(decode(member.store.get("handle")), 0)
    member.store.set("open", b"1")
    began = time.monotonic()
    failure = failure_of(queue.wait_until_ready, 20)
    queue.shutdown()
    return failure, time.monotonic() - began


def test_f22_the_name_of_a_killed_writer_is_removed_by_its_readers(world):
    failure, seconds = world(2, _dies_before_all_are_there, check=False)[1].value
    assert failure.kind == "PeerLostError"
    assert seconds < 2.0
