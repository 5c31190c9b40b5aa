import contextlib
import threading
import time

import pytest
import torch

from tests.faults.worlds import KINDS, failure_of, group, reduce_ones

DEADLINE = 0.6
JUMPS = (365 * 86400.0, -365 * 86400.0)
_real_time = time.time


def _jump(seconds):
    time.time = lambda: _real_time() + seconds


@contextlib.contextmanager
def _jump_soon(seconds):
    """The clock jumps in the middle of what the block waits for."""
    timer = threading.Timer(0.1, _jump, [seconds])
    timer.start()
    yield
    timer.join()


def _late_with_a_jumping_clock(member, kind, jump, signals):
    with group(member, kind) as comm:
        reduce_ones(comm, kind)
        if member.rank == 1:
            time.sleep(0.3)
            reduce_ones(comm, kind, timeout=DEADLINE)
            signals.wait_for("failed")
            return None
        with _jump_soon(jump):
            reduce_ones(comm, kind, timeout=DEADLINE)
        with _jump_soon(-jump):
            failure = failure_of(comm.all_reduce, torch.ones(4), timeout=DEADLINE, algorithm=KINDS[kind])
        signals.show("failed")
        return failure


@pytest.mark.parametrize(("kind", "jump"), [("cpu", JUMPS[0]), ("cpu", JUMPS[1]), ("triton", JUMPS[0])])
def test_f32_deadlines_do_not_follow_a_clock_that_jumps(world, signals, kind, jump):
    failure, _ = world(2, _late_with_a_jumping_clock, kind, jump, signals)
    assert (failure.kind, failure.peers) == ("PeerTimeoutError", (1,))
    assert DEADLINE - 0.1 < failure.seconds < DEADLINE + 1.0


def _jump_while_waiting(member, signals):
    jumps = iter(JUMPS * 100)
    sleep = time.sleep

    def jumping_sleep(seconds):
        _jump(next(jumps, 0.0))
        sleep(seconds)

    with group(member) as comm:
        reduce_ones(comm)
        if member.rank == 1:
            signals.wait_for("failed")
            return None
        time.sleep = jumping_sleep
        failure = failure_of(comm.all_reduce, torch.ones(4), timeout=DEADLINE)
        time.sleep = sleep
        signals.show("failed")
        return failure


def test_f32_a_clock_that_jumps_in_the_middle_of_a_wait_does_not_move_its_end(world, signals):
    failure, _ = world(2, _jump_while_waiting, signals)
    assert failure.kind == "PeerTimeoutError"
    assert DEADLINE - 0.1 < failure.seconds < DEADLINE + 1.0


def _meet_with_different_clocks(member, signals):
    _jump(JUMPS[member.rank])
    if member.rank == 1:
        time.sleep(0.3)
    for _ in range(3):
        with group(member) as comm:
            reduce_ones(comm)
            comm.prepare(1 << 20)
            reduce_ones(comm)


def test_f32_ranks_whose_clocks_are_years_apart_make_groups(world, signals):
    world(2, _meet_with_different_clocks, signals)
