import threading

import pytest

from tcomm.errors import UsageError
from tcomm.groups.all2all import surroundings
from tcomm.groups.all2all.surroundings import among, current_coordinator, find_coordinator, look_up_with


@pytest.fixture
def published(monkeypatch):
    monkeypatch.setattr(surroundings, "_found_by", [])
    groups = {}
    look_up_with(groups.get)
    return groups


def test_the_groups_are_those_that_the_layer_above_tells(published):
    published["dp"] = dp = object()
    assert find_coordinator("dp") is current_coordinator("dp") is dp
    assert find_coordinator("tp") is None
    with pytest.raises(UsageError, match="there is no TP group"):
        current_coordinator("tp")


def test_without_a_layer_above_there_is_none(monkeypatch):
    monkeypatch.setattr(surroundings, "_found_by", [])
    assert find_coordinator("dp") is None


def test_groups_in_the_making_come_first_and_may_be_alone(published):
    published["dp"], published["tp"] = old_dp, old_tp = object(), object()
    made = {}
    with among(made, alone=True):
        assert find_coordinator("dp") is None
        made["dp"] = new_dp = object()
        ep = object()
        with among({"ep": ep}):
            assert (find_coordinator("ep"), find_coordinator("dp")) == (ep, new_dp)
            assert find_coordinator("tp") is None
        assert find_coordinator("ep") is None
    with among({"dp": new_dp}):
        assert (find_coordinator("dp"), find_coordinator("tp")) == (new_dp, old_tp)
    assert find_coordinator("dp") is old_dp


def test_another_thread_does_not_see_them(published):
    seen = []
    with among({"dp": object()}):
        thread = threading.Thread(target=lambda: seen.append(find_coordinator("dp")))
        thread.start()
        thread.join(5)
    assert seen == [None]
