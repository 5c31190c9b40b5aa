import concurrent.futures
import threading
import time

import pytest
import torch

from tcomm.errors import CommError, ConfigError, PeerTimeoutError
from tcomm.groups.work import Work


def _explain(told):
    return PeerTimeoutError(f"collective is {told}", group="tp")


def test_a_wait_that_ends_too_early_is_told_apart_from_a_call_that_timed_out():
    future = concurrent.futures.Future()
    work = Work(future, _explain)
    assert not work.is_completed()
    with pytest.raises(PeerTimeoutError) as caught:
        work.wait(0.01)
    assert str(caught.value) == "collective is not complete after 0.01 s; it goes on"
    future.set_exception(PeerTimeoutError("timed out after 5 s", op="all_reduce"))
    assert work.is_completed()
    with pytest.raises(PeerTimeoutError, match="timed out after 5 s"):
        work.wait(0.01)
    with pytest.raises(CommError, match="timed out after 5 s"):
        work.wait()


def test_a_result_may_be_waited_for_again():
    future = concurrent.futures.Future()
    work, result = Work(future, _explain), torch.ones(2)
    future.set_result(result)
    assert work.wait() is result
    assert work.wait(1.0) is result


def _late_peer(member):
    comm = member.communicator()
    comm.all_reduce(torch.ones(4))
    member.meet("warm")
    if member.rank == 1:
        time.sleep(0.6)
        comm.all_reduce(torch.ones(4))
        comm.close()
        return None
    work = comm.all_reduce(torch.ones(4), async_op=True)
    assert not work.is_completed()
    with pytest.raises(PeerTimeoutError) as caught:
        work.wait(0.2)
    assert caught.value.peers == (1,)
    total = work.wait(20.0).tolist()
    assert work.is_completed()
    comm.close()
    return str(caught.value), total


def test_a_wait_names_the_late_rank_and_the_call_completes_later(on_ranks):
    told, total = on_ranks(2, _late_peer)[0]
    assert told.startswith("collective of group 'test' is not complete after 0.2 s; it goes on; ")
    assert "rank 1 is silent" in told
    assert total == [2.0] * 4


def _order(member):
    """Asynchronous and synchronous calls in one sequence; rank 0 is ahead of rank 1 all the time."""
    comm = member.communicator()
    comm.all_reduce(torch.ones(4))
    works, seen = [], []
    for turn in range(12):
        if member.rank == 1:
            time.sleep(0.01)
        x = torch.full((4 + turn % 3,), float(turn * (member.rank + 1)))
        if turn % 3 == 2:
            seen.append(comm.all_reduce(x, "max")[0].item())
        else:
            works.append(comm.all_reduce(x, async_op=True))
    comm.barrier()
    assert all(work.is_completed() for work in works)
    seen += [work.wait()[0].item() for work in works]
    comm.close()
    return seen


def test_asynchronous_and_synchronous_calls_keep_the_order_of_the_program(on_ranks):
    expected = [2.0 * t for t in (2, 5, 8, 11)] + [3.0 * t for t in (0, 1, 3, 4, 6, 7, 9, 10)]
    assert on_ranks(2, _order) == [expected] * 2


def _never_blocks(member):
    comm = member.communicator()
    comm.all_reduce(torch.ones(4))
    member.meet("warm")
    if member.rank == 1:
        time.sleep(1.0)
    started = time.monotonic()
    works = []
    for _ in range(3):
        works.append(comm.all_reduce(torch.ones(4), async_op=True))
        time.sleep(0.02)
    submitted = time.monotonic() - started
    assert [work.wait().tolist() for work in works] == [[2.0] * 4] * 3
    comm.close()
    return submitted


def test_an_asynchronous_call_returns_at_once_while_an_earlier_one_waits(on_ranks):
    assert on_ranks(2, _never_blocks)[0] < 0.6


def _errors(member):
    comm = member.communicator()
    if member.rank == 0:
        work = comm.all_reduce(torch.ones(4), "mean", async_op=True)
        with pytest.raises(ConfigError, match="reduce operation 'mean' is unknown"):
            work.wait()
    total = comm.all_reduce(torch.ones(4), async_op=True).wait().tolist()
    comm.close()
    return total


def test_an_error_of_an_asynchronous_call_comes_out_of_wait(on_ranks):
    assert on_ranks(2, _errors) == [[2.0] * 4] * 2


def _threads(member):
    """Two threads of each rank, taking turns in the same order on all of them."""
    comm, seen, turn = member.communicator(), [], threading.Semaphore(0)

    def second():
        for number in range(10):
            turn.acquire()
            seen.append(comm.all_reduce(torch.full((3,), float(number)))[0].item())
            done.release()

    done = threading.Semaphore(0)
    thread = threading.Thread(target=second)
    thread.start()
    for number in range(10):
        seen.append(comm.all_reduce(torch.full((3,), -float(number)))[0].item())
        turn.release()
        done.acquire()
    thread.join()
    comm.close()
    return seen


def test_a_group_may_be_used_from_several_threads(on_ranks):
    expected = [value for n in range(10) for value in (-2.0 * n, 2.0 * n)]
    assert on_ranks(2, _threads) == [expected] * 2


def _close_completes(member):
    comm = member.communicator()
    comm.all_reduce(torch.ones(2))
    if member.rank == 1:
        time.sleep(0.2)
    work = comm.all_reduce(torch.ones(4), async_op=True)
    comm.close()
    assert work.is_completed()
    return work.wait().tolist()


def test_close_completes_what_is_in_flight(on_ranks):
    assert on_ranks(2, _close_completes) == [[2.0] * 4] * 2
