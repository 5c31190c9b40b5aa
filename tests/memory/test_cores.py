import os

import pytest

from tcomm.memory import cores
from tcomm.memory.cores import HomeCore

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")


@pytest.fixture
def machine(monkeypatch):
    """Cores that the thread may run on, where it runs, and every move of it."""

    class Machine:
        def __init__(self):
            self.allowed, self.at, self.moves = {2, 5, 7}, 2, []

        def move(self, _pid, mask):
            self.moves.append(set(mask))
            self.allowed = set(mask)
            if self.at not in mask:
                self.at = min(mask)

    made = Machine()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(made.allowed))
    monkeypatch.setattr(os, "sched_setaffinity", made.move)
    monkeypatch.setattr(cores, "_current_core", lambda: made.at)
    return made


@pytest.mark.parametrize(("rank", "core"), [(0, 2), (1, 5), (2, 7), (4, 5)])
def test_ranks_spread_over_their_cores_and_may_run_on_all_of_them_again(machine, rank, core):
    HomeCore(rank).go()
    assert machine.at == core
    assert machine.moves == [{core}, {2, 5, 7}]


def test_a_rank_at_home_stays_until_it_is_moved(machine):
    home = HomeCore(1)
    home.go()
    machine.moves.clear()
    for _ in range(5):
        home.go()
    assert machine.moves == []
    machine.at = 7
    home.go()
    assert machine.moves == [{5}, {2, 5, 7}]


def test_a_rank_that_may_run_on_more_cores_finds_its_own_in_time(machine):
    machine.allowed, home = {2}, HomeCore(1)
    home.go()
    machine.allowed = {2, 5}
    for _ in range(cores._VISITS_PER_LOOK):
        home.go()
    assert machine.at == 5


def test_where_the_real_thread_runs_is_known():
    assert cores._current_core() in os.sched_getaffinity(0)
    HomeCore(0).go()
    assert cores._current_core() == min(os.sched_getaffinity(0))
