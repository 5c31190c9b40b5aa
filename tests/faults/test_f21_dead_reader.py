import contextlib
import os
import signal
import time

import pytest

from tcomm.errors import PeerLostError
from tests.groups.queue.peers import from_rank_0

VICTIM = 2


def _until_lost(member, drop, idle):
    queue = from_rank_0(member, chunks=2, drop_dead_readers=drop)
    if member.rank == VICTIM:
        os.kill(os.getpid(), signal.SIGKILL)
    if member.rank == 0:
        if idle:
            time.sleep(0.5)
        began, sent = time.monotonic(), 0
        try:
            for sent in range(20):
                queue.enqueue(sent, timeout=20)
        except PeerLostError as error:
            return str(error), error.peers, time.monotonic() - began, sent
        finally:
            queue.shutdown()
        return "all sent"
    got = []
    with contextlib.suppress(PeerLostError):
        while True:
            got.append(queue.dequeue(20))
    return got


@pytest.mark.parametrize("idle", [False, True])
def test_f21_a_dead_reader_is_named_within_two_seconds(world, idle):
    outcomes = world(3, _until_lost, False, idle, check=False)
    assert outcomes[VICTIM].exitcode == -signal.SIGKILL
    assert not outcomes[0].error, outcomes[0].error
    told, peers, seconds, sent = outcomes[0].value
    assert "the reader of rank 1 died (pid " in told
    assert peers == (1,)
    assert seconds < 2.0
    # One who looks only when the queue is full would have sent two.
    assert not idle or sent == 0


def test_f21_a_dead_reader_can_be_dropped_for_the_living(world):
    outcomes = world(3, _until_lost, True, False, check=False)
    assert not outcomes[0].error, outcomes[0].error
    assert outcomes[0].value == "all sent"
    assert outcomes[1].value == list(range(20)), outcomes[1].error
