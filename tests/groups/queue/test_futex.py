import ctypes
import threading
import time

from tcomm.groups.queue import futex
from tcomm.groups.queue.futex import can_be_ordered, order_others, sleep_while, wake_sleepers


def test_who_sleeps_is_woken_or_wakes_in_time():
    word = (ctypes.c_int64 * 1)(5)
    address = ctypes.addressof(word)
    seconds = []

    def sleep(value, limit):
        began = time.monotonic()
        sleep_while(address, value, limit)
        seconds.append(time.monotonic() - began)

    sleep(4, 20.0)
    assert seconds[0] < 1.0
    sleep(5, 0.1)
    assert 0.1 <= seconds[1] < 5.0
    sleepers = [threading.Thread(target=sleep, args=(5, 20.0)) for _ in range(2)]
    for sleeper in sleepers:
        sleeper.start()
    time.sleep(0.1)
    assert len(seconds) == 2
    for sleeper in sleepers:
        while sleeper.is_alive():
            # Perhaps it did not sleep yet, the last time.
            wake_sleepers(address)
            sleeper.join(0.01)
    assert all(0.05 < each < 10.0 for each in seconds[2:])


def test_other_processes_are_ordered_where_the_kernel_can(monkeypatch):
    results, done = [], futex._syscall

    def syscall(*args):
        results.append(done(*args))
        return results[-1]

    monkeypatch.setattr(futex, "_syscall", syscall)
    assert can_be_ordered()
    order_others()
    assert results == [0, 0]
    monkeypatch.setattr(futex, "_syscall", lambda *_: -1)
    assert not can_be_ordered()
    order_others()
