import gc
import threading
import time
import warnings

import pytest
import torch

from tests.faults.leaks import given_back
from tests.faults.worlds import KINDS, failure_of, group, reduce_ones, wait_until_in_flight


def _coalesce(comm):
    with comm.coalescing() as batch:
        batch.all_reduce(torch.ones(4))


USES = {
    "all_reduce": lambda comm: comm.all_reduce(torch.ones(4)),
    "async": lambda comm: comm.all_reduce(torch.ones(4), async_op=True),
    "another kind": lambda comm: comm.all_reduce(torch.ones(9), "max"),
    "barrier": lambda comm: comm.barrier(),
    "prepare": lambda comm: comm.prepare(1 << 20),
    "send": lambda comm: comm.send(torch.ones(4), 1 - comm.rank),
    "recv": lambda comm: comm.recv(torch.ones(4), 1 - comm.rank),
    "broadcast": lambda comm: comm.broadcast(torch.ones(4), 0),
    "broadcast async": lambda comm: comm.broadcast(torch.ones(4), 0, async_op=True),
    "all_gather_single": lambda comm: comm.all_gather_single(torch.ones(4)),
    "reduce_scatter_single": lambda comm: comm.reduce_scatter_single(torch.ones(4)),
    "all_to_all_single": lambda comm: comm.all_to_all_single(torch.ones(4)),
    "all_to_all_single ragged": lambda comm: comm.all_to_all_single(torch.ones(4), [1, 3]),
    "reduce": lambda comm: comm.reduce(torch.ones(4), 0),
    "reduce_scatterv": lambda comm: comm.reduce_scatterv([torch.ones(4)], [1, 3]),
    "all_gatherv": lambda comm: comm.all_gatherv(torch.ones(4), [4, 4]),
    "all_gatherv unknown": lambda comm: comm.all_gatherv(torch.ones(4)),
    "gather": lambda comm: comm.gather(torch.ones(4), 0),
    "scatter": lambda comm: comm.scatter(torch.ones(4), 0),
    "coalescing": _coalesce,
}
USES_OF_TORCH = {
    "send": lambda comm: comm.send(torch.ones(4), 1 - comm.rank, algorithm="torch"),
    "recv": lambda comm: comm.recv(torch.ones(4), 1 - comm.rank, algorithm="torch"),
}


def _use_after_close(member, kind):
    with group(member, kind) as comm:
        reduce_ones(comm, kind)
        comm.barrier()
        comm.close()
        comm.close()
        uses = USES | (USES_OF_TORCH if kind in ("torch", "remote") else {})
        told = {name: failure_of(use, comm) for name, use in uses.items()}
        comm.close()
        return told


@pytest.mark.parametrize("kind", KINDS)
def test_f29_a_closed_group_refuses_every_call_and_can_be_closed_again(world, kind):
    for told in world(2, _use_after_close, kind):
        for name, failure in told.items():
            assert failure.kind == "GroupClosedError", (name, failure)
            assert "it was closed" in failure.text
            assert failure.seconds < 0.5


def _close_alone(member, signals):
    with group(member) as comm:
        reduce_ones(comm)
        if member.rank == 1:
            signals.wait_for("waiting")
            time.sleep(0.2)
            comm.close()
            return None
        signals.show("waiting")
        failure = failure_of(reduce_ones, comm)
        return failure, failure_of(comm.barrier)


@pytest.mark.parametrize("world_size", [2, 3])
def test_f29_peers_are_told_who_closed_the_group(world, signals, world_size):
    results = world(world_size, _close_alone, signals)
    for rank in set(range(world_size)) - {1}:
        for failure in results[rank]:
            assert (failure.kind, failure.peers) == ("PeerLostError", (1,)), failure
            assert "rank 1 left: it closed the group" in failure.text
            assert failure.seconds < 2.0


def _close_in_flight(member, kind, signals):
    with group(member, kind) as comm:
        reduce_ones(comm, kind)
        if member.rank == 1:
            signals.wait_for("closing")
            time.sleep(0.3)
        works = []
        for n in range(3):
            x = torch.full((4,), float(n))
            works.append(comm.all_reduce(x, async_op=True, algorithm=KINDS[kind]))
            wait_until_in_flight(comm, works[0])
        signals.show("closing")
        started = time.monotonic()
        comm.close()
        waited = time.monotonic() - started
        assert all(work.is_completed() for work in works)
        sums = [work.wait().tolist() for work in works]
        assert sums == [[2.0 * n] * 4 for n in range(3)]
        return waited


@pytest.mark.parametrize("kind", ["cpu", "triton", "torch"])
def test_f29_closing_completes_what_is_in_flight(world, signals, kind):
    waited = world(2, _close_in_flight, kind, signals)
    assert waited[0] > 0.25


def _close_what_cannot_complete(member, signals):
    with group(member) as comm:
        reduce_ones(comm)
        if member.rank == 1:
            signals.wait_for("closed")
            return None
        work = comm.all_reduce(torch.ones(4), async_op=True, timeout=1.0)
        short = failure_of(work.wait, 0.2)
        started = time.monotonic()
        comm.close()
        waited = time.monotonic() - started
        signals.show("closed")
        return short, failure_of(work.wait), waited


def test_f29_closing_waits_no_longer_than_the_deadline_of_what_is_in_flight(world, signals):
    (short, failure, waited), _ = world(2, _close_what_cannot_complete, signals)
    assert (short.kind, short.peers) == ("PeerTimeoutError", (1,))
    assert "not complete after 0.2 s; it goes on" in short.text
    assert (failure.kind, failure.peers) == ("PeerTimeoutError", (1,))
    assert waited < 2.0


def _close_from_another_thread(member, signals):
    with group(member) as comm:
        reduce_ones(comm)
        if member.rank == 1:
            signals.wait_for("closing")
            time.sleep(0.2)
            reduce_ones(comm)
            return
        closer = threading.Timer(0.1, lambda: (signals.show("closing"), comm.close()))
        closer.start()
        reduce_ones(comm)
        closer.join(10)
        assert failure_of(comm.barrier).kind == "GroupClosedError"


def test_f29_a_close_in_another_thread_waits_for_the_call_under_way(world, signals):
    world(2, _close_from_another_thread, signals)


def _forget_to_close(member, signals):
    with given_back(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        comm = member.communicator()
        reduce_ones(comm)
        if member.rank == 1:
            del comm
            gc.collect()
            signals.show("forgotten")
            return None
        signals.wait_for("forgotten")
        failure = failure_of(reduce_ones, comm, timeout=3.0)
        comm.close()
        return failure


def test_f29_a_communicator_that_is_dropped_gives_everything_back_and_tells_its_peers(world, signals):
    failure, _ = world(2, _forget_to_close, signals)
    assert (failure.kind, failure.peers) == ("PeerLostError", (1,)), failure
    assert "rank 1 left: " in failure.text


def _close_and_make_again(member):
    for number in range(3):
        with group(member, name=f"group{number % 2}") as comm:
            reduce_ones(comm)
            reduce_ones(comm, numel=100_000)


def test_f29_a_group_can_be_made_again_after_it_was_closed(world):
    world(2, _close_and_make_again)
