import os
import signal
import time

import pytest
import torch

from tcomm.memory.channel import Channel
from tests.faults.worlds import (
    failure_of,
    group,
    reduce_ones,
    reduce_until_failure,
    stop_myself,
    wait_until_stopped,
)

VICTIM = 1
DEADLINE = 0.8


def _stop_in_the_middle(signals, epoch):
    begin = Channel.begin

    def stopping(channel, call, timeout):
        taken = begin(channel, call, timeout)
        if taken == epoch:
            stop_myself(signals, "stopping")
        return taken

    Channel.begin = stopping


def _with_a_stopped_rank(member, kind, signals):
    if member.rank == VICTIM:
        _stop_in_the_middle(signals, 6)
    with group(member, kind, timeout=DEADLINE) as comm:
        for _ in range(2):
            reduce_ones(comm, kind, timeout=20.0)
        failure = reduce_until_failure(comm, kind, signals)
        signals.show(f"failed-{member.rank}")
        again = failure_of(reduce_ones, comm, kind)
        signals.wait_for(*(f"failed-{rank}" for rank in range(member.world_size)))
    return failure, again


@pytest.mark.parametrize("kind", ["cpu", "triton", "torch"])
def test_f02_a_stopped_rank_is_named_at_the_deadline_and_told_when_it_goes_on(world, signals, kind):
    pids = []

    def go_on_when_given_up(processes):
        pids.append(processes[VICTIM].pid)
        wait_until_stopped(pids[0])
        signals.wait_for("failed-0", "failed-2")
        os.kill(pids[0], signal.SIGCONT)

    results = world(3, _with_a_stopped_rank, kind, signals, during=go_on_when_given_up)
    for rank in (0, 2):
        failure = results[rank][0]
        assert failure.kind == "PeerTimeoutError", failure
        assert DEADLINE - 0.1 < failure.seconds < DEADLINE + 1.0, failure
        assert (failure.op, failure.rank, failure.peers) == ("all_reduce", rank, (VICTIM,))
        assert failure.seq == 6
        assert f"pid {pids[0]}, stopped by a signal" in failure.text
    assert any(f"timed out after {DEADLINE} s" in results[rank][0].text for rank in (0, 2))
    failure, _ = results[VICTIM]
    assert failure.kind == "PeerTimeoutError", failure
    assert f"the others gave up waiting for this rank, {VICTIM}" in failure.text
    assert all(again.kind == "PeerTimeoutError" and again.seconds < 0.5 for _, again in results)


def _without_a_deadline(member, kind, signals):
    if member.rank == VICTIM:
        _stop_in_the_middle(signals, 6)
    with group(member, kind, timeout=DEADLINE) as comm:
        for _ in range(2):
            reduce_ones(comm, kind)
        started = time.monotonic()
        for profile in (None, "batch_job", None, None):
            reduce_ones(comm, kind, timeout=profile)
        return time.monotonic() - started


@pytest.mark.parametrize("kind", ["cpu", "triton"])
def test_f02_without_a_deadline_the_call_completes_when_the_rank_goes_on(world, signals, kind):
    stopped_for = DEADLINE + 0.3

    def go_on_later(processes):
        wait_until_stopped(processes[VICTIM].pid)
        time.sleep(stopped_for)
        os.kill(processes[VICTIM].pid, signal.SIGCONT)

    waited = world(2, _without_a_deadline, kind, signals, during=go_on_later)
    assert min(waited) > stopped_for - 0.1


def _stop_before_preparing(member, signals):
    with group(member, timeout=DEADLINE) as comm:
        if member.rank == VICTIM:
            stop_myself(signals, "stopping")
            return failure_of(comm.barrier)
        failure = failure_of(comm.all_reduce, torch.ones(4))
        signals.show("failed")
        return failure


def test_f02_a_rank_stopped_before_its_first_collective_is_named(world, signals):
    def go_on_when_given_up(processes):
        signals.wait_for("failed")
        os.kill(processes[VICTIM].pid, signal.SIGCONT)

    failure, told = world(2, _stop_before_preparing, signals, during=go_on_when_given_up)
    assert (failure.kind, failure.peers) == ("PeerTimeoutError", (VICTIM,))
    assert "stopped by a signal" in failure.text
    assert told.kind == "PeerTimeoutError"
