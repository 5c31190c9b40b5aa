import threading
import time

import pytest
import torch

from tests.faults.worlds import KINDS, CallInThread, failure_of, group, reduce_ones, wait_until_in_flight

THREADS = 3


def _in_threads(count, run):
    """Call `run(number)` in threads that start together; returns their errors."""
    errors, start = [], threading.Barrier(count)

    def guarded(number):
        try:
            start.wait(10)
            run(number)
        except BaseException as error:
            errors.append(repr(error))

    threads = [threading.Thread(target=guarded, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return errors


def _call_in_threads(member, kind, calls):
    with group(member, kind) as comm:

        def run(number):
            for _ in range(calls):
                reduce_ones(comm, kind)

        errors = _in_threads(THREADS, run)
        reduce_ones(comm, kind)
        comm.barrier()
        return errors


@pytest.mark.parametrize(("kind", "calls"), [("cpu", 50), ("triton", 3), ("torch", 20), ("remote", 20)])
def test_f30_calls_of_several_threads_are_serialised(world, kind, calls):
    assert world(2, _call_in_threads, kind, calls) == [[], []]


def _first_calls_in_threads(member):
    with group(member) as comm:
        errors = _in_threads(THREADS, lambda number: reduce_ones(comm, numel=9))
        reduce_ones(comm)
        return errors


def test_f30_threads_may_make_the_very_first_call_together(world):
    assert world(3, _first_calls_in_threads) == [[]] * 3


def _handles(member, kind, count, signals):
    algorithm = KINDS[kind]
    with group(member, kind) as comm:
        reduce_ones(comm, kind)
        if member.rank == 1:
            signals.wait_for("submitted")
        works = []
        for n in range(count):
            x = torch.full((3,), float(n + member.rank))
            works.append(comm.all_reduce(x, async_op=True, algorithm=algorithm))
            wait_until_in_flight(comm, works[0])
        signals.show("submitted")
        behind = comm.all_reduce(torch.full((3,), 1000.0), algorithm=algorithm)
        assert all(work.is_completed() for work in works)
        sums = [work.wait().tolist() for work in reversed(works)]
        assert sums == [[2.0 * n + 1] * 3 for n in reversed(range(count))]
        assert works[0].wait().tolist() == [1.0] * 3
        return behind.tolist()


@pytest.mark.parametrize(("kind", "count"), [("cpu", 20), ("triton", 4), ("torch", 10)])
def test_f30_handles_complete_in_the_order_of_their_calls(world, signals, kind, count):
    assert world(2, _handles, kind, count, signals) == [[2000.0] * 3] * 2


def _mixed(member, kind):
    """Handles of several threads, with calls of the main thread between them."""
    with group(member, kind) as comm:

        def run(number):
            for n in range(10):
                if (n + number) % 2:
                    reduce_ones(comm, kind)
                else:
                    x = torch.arange(4.0) + member.rank
                    out = comm.all_reduce(x, async_op=True, algorithm=KINDS[kind]).wait(20)
                    assert out.tolist() == [1.0, 3.0, 5.0, 7.0]

        return _in_threads(THREADS, run)


def test_f30_handles_and_calls_of_several_threads_do_not_mix(world):
    assert world(2, _mixed, "cpu") == [[], []]


def _broadcast_in_turns(member, kind):
    with group(member, kind) as comm:
        x = torch.full((4,), float(member.rank))

        def run(number):
            for _ in range(20):
                asynchronous = bool(number % 2)
                out = comm.broadcast(x, 1, async_op=asynchronous, algorithm=KINDS[kind])
                out = out.wait(20) if asynchronous else out
                assert out.tolist() == [1.0] * 4

        errors = _in_threads(THREADS, run)
        reduce_ones(comm, kind)
        return errors


@pytest.mark.parametrize("kind", ["cpu", "torch"])
def test_f30_handles_and_calls_of_other_verbs_do_not_mix(world, kind):
    assert world(2, _broadcast_in_turns, kind) == [[], []]


USES = {
    "cpu": lambda comm, x, **how: comm.all_reduce(x, "max", **how),
    "torch": lambda comm, x, **how: comm.broadcast(x, 1, algorithm="torch", **how),
}


def _handle_beside_a_call(member, kind, signals):
    use, x = USES[kind], torch.full((4,), float(member.rank))
    with group(member, kind, timeout=5.0) as comm:
        reduce_ones(comm, kind)
        if member.rank == 1:
            signals.wait_for("submitted", timeout=4.0)
            return [use(comm, x).tolist() for _ in range(3)]
        call = CallInThread(use, comm, x)
        wait_until_in_flight(comm, call)
        works = [use(comm, x, async_op=True) for _ in range(2)]
        time.sleep(0.05)
        signals.show("submitted")
        return [waited.wait(5).tolist() for waited in (call, *works)]


@pytest.mark.parametrize("kind", USES)
def test_f30_a_handle_is_given_at_once_while_another_thread_is_in_a_call(world, signals, kind):
    assert world(2, _handle_beside_a_call, kind, signals) == [[[1.0] * 4] * 3] * 2


def _failing_handle(member):
    with group(member) as comm:
        reduce_ones(comm)
        numel = 4 + member.rank
        works = [comm.all_reduce(torch.ones(n), async_op=True) for n in (4, numel, 4)]
        assert works[0].wait().tolist() == [2.0] * 4
        failure = failure_of(works[1].wait)
        assert works[2].wait().tolist() == [2.0] * 4
        return failure


def test_f30_a_handle_raises_what_its_own_call_met(world):
    for failure in world(2, _failing_handle):
        assert failure.kind == "CollectiveMismatchError", failure
