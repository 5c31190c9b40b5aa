import atexit
import gc
import json
import multiprocessing
import multiprocessing.util
import os
import select
import signal

import pytest
import torch

from tcomm.memory.control import Word
from tests.faults.worlds import CallInThread, failure_of, group, reduce_ones, wait_until_in_flight

CHILD_SECONDS = 8.0

USES = {
    "all_reduce": lambda comm: comm.all_reduce(torch.ones(4)),
    "out": lambda comm: comm.all_reduce(torch.ones(4), out=torch.ones(4)),
    "async": lambda comm: comm.all_reduce(torch.ones(4), async_op=True),
    "a known kind": lambda comm: comm.all_reduce(torch.ones(3)),
    "another kind": lambda comm: comm.all_reduce(torch.ones(9), "max"),
    "barrier": lambda comm: comm.barrier(),
    "prepare": lambda comm: comm.prepare(1 << 20),
    "send": lambda comm: comm.send(torch.ones(4), 1 - comm.rank),
    "recv": lambda comm: comm.recv(torch.ones(4), 1 - comm.rank),
}


def _answer_of_child(run):
    """What `run` returns in a forked child that then ends as a program does."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, json.dumps(run()).encode())
            atexit._run_exitfuncs()
            multiprocessing.util._exit_function()
        finally:
            os._exit(0)
    os.close(writer)
    try:
        if not select.select([reader], [], [], CHILD_SECONDS)[0]:
            os.kill(pid, signal.SIGKILL)
        return json.loads(os.read(reader, 65536) or "null")
    finally:
        os.close(reader)
        os.waitpid(pid, 0)


def _use_everything(comm):
    told = {name: [*_kind_and_text(failure_of(use, comm))] for name, use in USES.items()}
    comm.close()
    told["closed"] = [*_kind_and_text(failure_of(comm.barrier))]
    gc.collect()
    return told


def _kind_and_text(failure):
    return failure.kind, failure.text


def _fork_in_the_middle(member, kind):
    with group(member, kind) as comm:
        reduce_ones(comm, kind)
        USES["a known kind"](comm)
        told = _answer_of_child(lambda: _use_everything(comm)) if member.rank == 0 else {}
        for numel in (4, 5, 4):
            reduce_ones(comm, kind, numel=numel)
        comm.barrier()
        left = [page.words[Word.LEFT] for page in comm._arena.channel.pages]
        comm.barrier()
        return os.getpid(), told, left


@pytest.mark.parametrize("kind", ["cpu", "triton", "torch"])
def test_f28_a_forked_child_is_refused_and_its_end_does_not_disturb_the_parent(world, kind):
    results = world(2, _fork_in_the_middle, kind)
    pid, told, _ = results[0]
    assert set(told) == {*USES, "closed"}
    for name, (error, text) in told.items():
        assert error == "GroupClosedError", (name, text)
        assert f"belongs to process {pid}" in text
    assert [left for _, _, left in results] == [[0, 0]] * 2


def _fork_in_a_call(member, how, signals):
    with group(member) as comm:
        reduce_ones(comm)
        if member.rank == 1:
            signals.wait_for("forked")
            reduce_ones(comm)
            reduce_ones(comm)
            return None
        if how == "thread":
            work = CallInThread(reduce_ones, comm)
        else:
            work = comm.all_reduce(torch.arange(4.0), async_op=True)
        wait_until_in_flight(comm, work)
        told = _answer_of_child(lambda: _use_everything(comm))
        signals.show("forked")
        if how == "thread":
            work.wait(10)
        else:
            assert work.wait(10).tolist() == [1.0, 3.0, 5.0, 7.0]
        reduce_ones(comm)
        return told


@pytest.mark.parametrize("how", ["thread", "async"])
def test_f28_a_child_forked_while_a_collective_is_under_way_is_refused_and_does_not_hang(world, signals, how):
    told, _ = world(2, _fork_in_a_call, how, signals)
    assert told is not None, f"the child hung for {CHILD_SECONDS} s"
    assert {error for error, _ in told.values()} == {"GroupClosedError"}


def _child_of_multiprocessing(comm, sender):
    sender.send(_use_everything(comm))
    raise SystemExit(3)


def _start_a_child(member):
    with group(member) as comm:
        reduce_ones(comm)
        told = {}
        if member.rank == 0:
            context = multiprocessing.get_context("fork")
            receiver, sender = context.Pipe(duplex=False)
            child = context.Process(target=_child_of_multiprocessing, args=(comm, sender))
            child.start()
            told = receiver.recv() if receiver.poll(CHILD_SECONDS) else {}
            child.join(CHILD_SECONDS)
            assert child.exitcode == 3
            child.close()
            receiver.close()
            sender.close()
        reduce_ones(comm)
        comm.barrier()
        return told


def test_f28_a_child_of_multiprocessing_is_refused_and_its_exit_is_not_taken_for_the_parents(world):
    told, _ = world(2, _start_a_child)
    assert {error for error, _ in told.values()} == {"GroupClosedError"}


def _hold_in_child(member, signals):
    """The parent is killed; its child, who has inherited every descriptor, lives on."""
    with group(member) as comm:
        reduce_ones(comm)
        if member.rank == 1:
            pid = os.fork()
            if pid == 0:
                signals.wait_for("failed")
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
        failure = failure_of(reduce_ones, comm)
        signals.show("failed")
        return failure


def test_f28_a_child_that_outlives_its_killed_parent_does_not_hide_the_death(world, signals):
    outcomes = world(2, _hold_in_child, signals, check=False)
    failure = outcomes[0].value
    assert (failure.kind, failure.peers) == ("PeerLostError", (1,))
    assert failure.seconds < 2.0
