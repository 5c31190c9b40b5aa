import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.faults import plain
from tests.faults.worlds import failure_of, group, reduce_ones
from tests.ranks import Member

VICTIM = 1
LIMIT_SECONDS = 2.0
_kept = []


def _survive(comm, signals):
    reduce_ones(comm)
    signals.show("waiting")
    failure = failure_of(reduce_ones, comm)
    again = failure_of(comm.barrier)
    return failure, again


def _check(failure, again, reason):
    assert failure.kind == "PeerLostError", failure
    assert (failure.op, failure.peers) == ("all_reduce", (VICTIM,))
    assert f"rank {VICTIM} left: {reason}" in failure.text, failure.text
    assert (again.kind, again.peers) == ("PeerLostError", (VICTIM,))
    assert again.seconds < 0.5


def _child(member, directory, how, signals, sender):
    """What a child of multiprocessing does by itself: nothing is caught."""
    os.environ["TCOMM_SHM_DIR"] = directory
    comm = member.communicator()
    _kept.append(comm)
    reduce_ones(comm)
    signals.wait_for("waiting")
    time.sleep(0.1)
    sender.send(time.monotonic())
    if how == "raise":
        raise ValueError("boom")
    if how == "exit":
        sys.exit("enough")


def _child_of(port, key, directory, how, signals, sender):
    _child(Member(VICTIM, 2, plain.store_of(port, key)), directory, how, signals, sender)


def _one_survivor(member, port, key, signals):
    with group(Member(0, 2, plain.store_of(port, key))) as comm:
        return _survive(comm, signals)


ENDS = {"raise": "ValueError: boom", "exit": "SystemExit: enough", "return": "its process exited"}


@pytest.mark.parametrize("how", ENDS)
def test_f03_a_child_of_multiprocessing_says_why_it_left(world, rank_server, memory_directory, signals, how):
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    key = f"child-{how}"
    port = rank_server._store.port
    child = context.Process(target=_child_of, args=(port, key, memory_directory, how, signals, sender))
    child.start()
    with contextlib.closing(receiver), contextlib.closing(sender), contextlib.closing(child):
        (failures,) = world(1, _one_survivor, port, key, signals)
        child.join(10)
        assert child.exitcode == (how != "return")
        _check(*failures, ENDS[how])
        assert failures[0].at - receiver.recv() < LIMIT_SECONDS


@pytest.mark.parametrize("how", ["raise", "exit"])
def test_f03_a_program_says_why_it_left(world, rank_server, memory_directory, signals, how):
    key, port = f"plain-{how}", rank_server._store.port
    command = [sys.executable, "-m", "tests.faults.plain", str(port), key, memory_directory, how]
    program = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    (failures,) = world(1, _one_survivor, port, key, signals)
    _, told = program.communicate(timeout=20)
    _check(*failures, "its process exited" if how == "exit" else ENDS[how])
    assert program.returncode == 1
    assert ("ValueError: boom" in told) == (how == "raise")


def test_f01_a_killed_program_that_nobody_waits_for_was_killed_by_sigkill(
    world, rank_server, memory_directory, signals
):
    key, port = "plain-loop", rank_server._store.port
    command = [sys.executable, "-m", "tests.faults.plain", str(port), key, memory_directory, "loop"]
    program = subprocess.Popen(command)

    def kill(_):
        signals.wait_for("waiting")
        program.send_signal(signal.SIGKILL)

    ((failure,),) = world(1, _loop_with_a_program, port, key, signals, during=kill)
    assert program.wait(10) == -signal.SIGKILL
    assert failure.kind == "PeerLostError"
    assert f"rank 1 died (pid {program.pid}, killed by SIGKILL; it has completed call #" in failure.text


def _loop_with_a_program(member, port, key, signals):
    with group(Member(0, 2, plain.store_of(port, key))) as comm:
        reduce_ones(comm)
        signals.show("waiting")

        def loop():
            for _ in range(10**7):
                comm.all_reduce(torch.ones(4))

        return (failure_of(loop),)


def _raise_inside_with(member, signals):
    if member.rank == VICTIM:
        try:
            with group(member) as comm:
                reduce_ones(comm)
                signals.wait_for("waiting")
                with comm:
                    raise ValueError("boom")
        except ValueError:
            signals.show("left")
            return None
    with group(member) as comm:
        return _survive(comm, signals)


def test_f03_an_exception_that_leaves_the_with_block_is_the_reason(world, signals):
    failure, again = world(2, _raise_inside_with, signals)[0]
    _check(failure, again, "ValueError: boom")


def _fork_a_child_with_a_group(member, signals):
    with group(member) as comm:
        reduce_ones(comm)
    context = multiprocessing.get_context("fork")
    if member.rank == VICTIM:
        child = context.Process(target=_new_group_in_a_child, args=(member, signals))
        child.start()
        child.join(20)
        return child.exitcode
    with group(member, name="second") as comm:
        return _survive(comm, signals)


def _new_group_in_a_child(member, signals):
    member = Member(member.rank, member.world_size, member.store.clone())
    comm = member.communicator(name="second")
    reduce_ones(comm)
    signals.wait_for("waiting")
    raise ValueError("boom")


def test_f03_a_forked_child_says_why_it_left_its_own_group(world, signals):
    (failure, again), exitcode = world(2, _fork_a_child_with_a_group, signals)
    assert exitcode == 1
    _check(failure, again, "ValueError: boom")
