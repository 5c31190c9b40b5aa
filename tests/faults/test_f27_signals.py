import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from tests.faults import plain
from tests.faults.meeting import create
from tests.faults.worlds import failure_of, group, reduce_ones
from tests.groups.queue.peers import from_rank_0
from tests.ranks import Member

VICTIM = 1
LIMIT_SECONDS = 0.1
"""From the signal to the exception."""
WAIT_SECONDS = 0.2
RAISED = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}


def _leave(number, _):
    raise SystemExit(f"told to by signal {number}")


@contextlib.contextmanager
def _handlers():
    """Ctrl-C as Python has it, and SIGTERM as a server would."""
    before = [
        (number, signal.signal(number, handler))
        for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, _leave))
    ]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _seconds_to_interrupt(number, wait):
    """How long it takes until a signal ends `wait`, which is in the middle of it by then."""
    sent = []

    def send():
        sent.append(time.monotonic())
        os.kill(os.getpid(), number)

    timer = threading.Timer(WAIT_SECONDS, send)
    timer.start()
    try:
        with _handlers(), pytest.raises(RAISED[number]):
            wait()
        return time.monotonic() - sent[0]
    finally:
        timer.join()


def _interrupted_in_a_call(member, kind, number, signals):
    with group(member, kind) as comm:
        reduce_ones(comm, kind)
        if member.rank == VICTIM:
            seconds = _seconds_to_interrupt(number, lambda: reduce_ones(comm, kind))
            signals.show("interrupted")
            signals.wait_for("told")
            return seconds
        signals.wait_for("interrupted")
        told = failure_of(reduce_ones, comm, kind)
        signals.show("told")
        return told


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("cpu", signal.SIGINT),
        ("cpu", signal.SIGTERM),
        ("triton", signal.SIGTERM),
        ("torch", signal.SIGINT),
    ],
)
def test_f27_a_signal_ends_a_wait_at_once_and_the_peers_are_told(world, signals, kind, number):
    told, seconds = world(2, _interrupted_in_a_call, kind, number, signals)
    assert seconds < LIMIT_SECONDS
    assert (told.kind, told.peers, told.op) == ("PeerLostError", (VICTIM,), "all_reduce"), told
    assert f"rank {VICTIM} was interrupted in the middle of it" in told.text
    assert told.seconds < 2.0


def _interrupted_without_shared_memory(member, number, signals):
    with group(member, "remote") as comm:
        reduce_ones(comm, "remote")
        if member.rank == VICTIM:
            return _seconds_to_interrupt(number, lambda: reduce_ones(comm, "remote"))
        return failure_of(_reduce_until_told, comm)


def _reduce_until_told(comm):
    while True:
        time.sleep(2 * WAIT_SECONDS)
        reduce_ones(comm, "remote")


@pytest.mark.parametrize("number", RAISED)
def test_f27_a_signal_ends_a_wait_where_nothing_is_shared_and_peers_see_the_connection_end(
    world, signals, number
):
    told, seconds = world(2, _interrupted_without_shared_memory, number, signals)
    assert seconds < LIMIT_SECONDS
    assert told.kind == "PeerLostError", told
    assert "onnection" in told.text


def _interrupted_in_rendezvous(member, number, directory):
    if member.rank != VICTIM:
        return os.listdir(directory)
    return _seconds_to_interrupt(number, member.communicator), os.listdir(directory)


@pytest.mark.parametrize("number", RAISED)
def test_f27_a_signal_in_rendezvous_leaves_no_memory_behind(world, memory_directory, number):
    _, (seconds, left) = world(2, _interrupted_in_rendezvous, number, memory_directory)
    assert seconds < LIMIT_SECONDS
    assert left == []


def _reduce_with_a_program(member, port, key, signals):
    with group(Member(0, 2, plain.store_of(port, key))) as comm:
        reduce_ones(comm)
        signals.show("waited for")
        signals.wait_for("signalled")
        return failure_of(_reduce_for_ever, comm)


def _reduce_for_ever(comm):
    for _ in range(10**7):
        comm.all_reduce(torch.ones(4))


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGINT, "rank 1 was interrupted in the middle of it"),
        (signal.SIGTERM, "rank 1 died (pid {pid}, killed by SIGTERM"),
    ],
)
def test_f27_a_program_that_handles_no_signal_ends_by_it_and_the_peers_are_told(
    world, rank_server, memory_directory, signals, number, reason
):
    key, port = f"plain-signal-{number}", rank_server._store.port
    command = [sys.executable, "-m", "tests.faults.plain", str(port), key, memory_directory, "loop"]
    program = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def interrupt(_):
        signals.wait_for("waited for")
        time.sleep(WAIT_SECONDS)
        program.send_signal(number)
        # How it ended is known for as long as nobody has asked for it.
        os.waitid(os.P_PID, program.pid, os.WEXITED | os.WNOWAIT)
        signals.show("signalled")

    (failure,) = world(1, _reduce_with_a_program, port, key, signals, during=interrupt)
    _, told = program.communicate(timeout=20)
    assert ("KeyboardInterrupt" in told) == (number == signal.SIGINT)
    assert program.returncode == -number
    assert (failure.kind, failure.peers) == ("PeerLostError", (VICTIM,))
    assert reason.format(pid=program.pid) in failure.text, failure.text
    assert failure.seconds < 2.0


def _interrupted_in_a_queue(member, number):
    queue = from_rank_0(member)
    seconds = None
    if member.rank == VICTIM:
        seconds = _seconds_to_interrupt(number, lambda: queue.dequeue(20))
    member.meet("interrupted")
    if member.rank == 0:
        queue.enqueue("later", 20)
    else:
        assert queue.dequeue(20) == "later"
    member.meet("read")
    queue.shutdown()
    return seconds


def _interrupted_in_a_stateless_group(member, number):
    made = create(member, member.rank, member.world_size)
    if member.rank == VICTIM:
        seconds = [
            _seconds_to_interrupt(number, wait)
            for wait in (lambda: made.recv_obj(0), lambda: made.barrier(20.0))
        ]
        member.meet("interrupted")
        return max(seconds)
    member.meet("interrupted")
    return None


@pytest.mark.parametrize("number", RAISED)
@pytest.mark.parametrize("wait", [_interrupted_in_a_queue, _interrupted_in_a_stateless_group])
def test_f27_a_signal_ends_a_wait_for_an_object_at_once(world, wait, number):
    _, seconds = world(2, wait, number)
    assert seconds < LIMIT_SECONDS
