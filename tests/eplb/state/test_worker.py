import threading
import time

import pytest
import torch

from tcomm.eplb.state.worker import Worker
from tcomm.errors import CommError, PeerLostError, UsageError

CPU = torch.device("cpu")


class Layer:
    """A switch that notes who did what, and that lets its preparation be held up or fail."""

    def __init__(self, number, told, hold=None, error=None):
        self._number, self._told, self._hold, self._error = number, told, hold, error
        self.verdict = None

    def prepare(self):
        if self._hold is not None:
            assert self._hold.wait(20)
        if self._error is not None:
            raise self._error
        self._told.append(("prepare", self._number, threading.current_thread() is threading.main_thread()))

    def settle(self, is_agreed):
        return is_agreed if self.verdict is None else self.verdict

    def commit(self):
        self._told.append(("commit", self._number, threading.current_thread() is threading.main_thread()))


def _alone(number):
    return number


def _until(worker, is_so, seconds=20.0):
    """Steps until something holds; the results of the steps."""
    end, results = time.monotonic() + seconds, []
    while not is_so():
        assert time.monotonic() < end
        results.append(worker.on_step())
        time.sleep(0.001)
    return results


def test_a_layer_is_switched_a_step_by_the_main_thread():
    told = []
    worker = Worker(_alone, CPU, name="ep")
    assert not worker.is_busy
    assert worker.on_step() is False
    assert worker.thread is None
    for _ in range(2):
        told.clear()
        worker.start(lambda: [Layer(n, told) for n in range(3)])
        assert worker.is_busy
        with pytest.raises(UsageError, match="'ep' still moves"):
            worker.start(list)
        assert _until(worker, lambda: not worker.is_busy).count(True) == 3
        # A layer is prepared when the one before has been switched: there is memory for one.
        assert told == [step for n in range(3) for step in (("prepare", n, False), ("commit", n, True))]
    thread = worker.thread
    assert thread.daemon
    assert thread.name == "eplb-ep"
    worker.stop()
    worker.stop()
    assert not thread.is_alive()
    with pytest.raises(UsageError, match="is stopped"):
        worker.start(list)


def test_steps_do_not_wait_for_the_thread():
    told, hold = [], threading.Event()
    worker = Worker(_alone, CPU)
    worker.start(lambda: [Layer(0, told, hold)])
    assert [worker.on_step() for _ in range(50)] == [False] * 50
    assert not told
    hold.set()
    assert _until(worker, lambda: not worker.is_busy)[-1] is True
    worker.stop()


def test_nothing_is_switched_before_all_ranks_are_ready():
    told, others = [], [0]
    asked = []

    def smallest(number):
        asked.append(number)
        return min(number, others[0])

    worker = Worker(smallest, CPU)
    worker.start(lambda: [Layer(n, told) for n in range(2)])
    _until(worker, lambda: 1 in asked)
    assert worker.on_step() is False
    assert told == [("prepare", 0, False)]
    others[0] = 1
    assert worker.on_step() is True
    assert worker.on_step() is False
    assert worker.is_busy
    others[0] = 2
    _until(worker, lambda: not worker.is_busy)
    assert told[-1] == ("commit", 1, True)
    worker.stop()


def test_a_plan_without_changes_ends_on_all_ranks_in_one_step():
    others = [0]
    worker = Worker(lambda number: min(number, others[0]), CPU)
    worker.start(list)
    for _ in range(20):
        assert worker.on_step() is False
        assert worker.is_busy
    others[0] = 1 << 30
    _until(worker, lambda: not worker.is_busy)
    worker.stop()


def test_what_the_thread_fails_of_is_raised_by_a_step(caplog):
    told = []
    worker = Worker(_alone, CPU, name="ep")
    lost = PeerLostError("rank 2 died", peers=(2,))
    worker.start(lambda: [Layer(0, told), Layer(1, told, error=lost)])
    with pytest.raises(PeerLostError, match="rank 2 died") as caught:
        _until(worker, lambda: False)
    assert caught.value.__notes__ == [
        "1 layers of this rearrangement hold the new map, the others the old one"
    ]
    assert "'ep' failed: rank 2 died" in caplog.text
    assert not worker.is_busy
    # It is free for another plan, also one that fails before it says anything.
    worker.start(lambda: Layer(0, told, error=KeyError("load")).prepare())
    with pytest.raises(KeyError, match="load"):
        _until(worker, lambda: False)
    worker.start(lambda: [Layer(7, told)])
    _until(worker, lambda: not worker.is_busy)
    assert told[-1] == ("commit", 7, True)
    worker.stop()


def test_a_failure_elsewhere_is_raised_here_too(monkeypatch):
    monkeypatch.setattr("tcomm.eplb.state.worker._SECONDS_TO_NOTICE", 0.05)
    hold, told = threading.Event(), []
    worker = Worker(lambda number: -1, CPU, name="ep", timeout=0.05)
    worker.start(lambda: [Layer(0, told, hold)])
    with pytest.raises(CommError, match=r"another rank of group 'ep' .* 0 layers"):
        worker.on_step()
    assert not worker.is_busy
    with pytest.raises(CommError, match=r"'ep' still waits for its peers after 0\.1 s"):
        worker.stop()
    hold.set()
    worker.thread.join(20)
    worker.stop()
    assert ("commit", 0, True) not in told


@pytest.mark.parametrize("hears", [True, False])
@pytest.mark.parametrize("verdict", [True, False])
def test_who_does_not_hear_of_a_step_switches_as_the_others_do(hears, verdict):
    told, layer = [], None

    def smallest(number):
        if number == 1 and not hears:
            raise PeerLostError("rank 2 died", peers=(2,))
        return number

    layer = Layer(0, told)
    layer.verdict = verdict
    worker = Worker(smallest, CPU, name="ep")
    worker.start(lambda: [layer, Layer(1, told)])
    if hears and verdict:
        _until(worker, lambda: not worker.is_busy)
    else:
        text = "rank 2 died" if not hears else "another rank of group 'ep' could not agree .* 0 layers"
        with pytest.raises(CommError, match=text):
            _until(worker, lambda: False)
    assert (("commit", 0, True) in told) == verdict
    assert not worker.is_busy
    worker.stop()


def test_a_thread_that_notices_a_little_later_is_waited_for():
    hold = threading.Event()
    worker = Worker(_alone, CPU, timeout=0.05)
    worker.start(lambda: [Layer(0, [], hold)])
    threading.Timer(0.3, hold.set).start()
    worker.stop()
    assert not worker.thread.is_alive()


def test_it_stops_in_the_middle():
    told = []
    worker = Worker(_alone, CPU)
    worker.start(lambda: [Layer(n, told) for n in range(2)])
    while not told:
        time.sleep(0.001)
    worker.stop()
    assert not worker.thread.is_alive()
    assert not worker.is_busy
    assert told == [("prepare", 0, False)]


def test_it_goes_on_while_the_main_thread_spins():
    told = []
    worker = Worker(_alone, CPU)
    worker.start(lambda: [Layer(n, told) for n in range(20)])
    end, spins = time.monotonic() + 20, 0
    while worker.is_busy and time.monotonic() < end:
        # No call here gives the interpreter away.
        spins += 1
        if spins % 1000 == 0:
            worker.on_step()
    assert len(told) == 40
    worker.stop()
