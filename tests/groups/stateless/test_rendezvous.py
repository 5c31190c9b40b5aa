import threading
import time

import msgspec
import pytest
import torch.distributed as dist

from tcomm.errors import DuplicateRankError, GroupMismatchError, RendezvousError
from tcomm.groups.stateless import rendezvous
from tcomm.groups.stateless.rendezvous import is_open, meet
from tcomm.groups.stateless.sealed import SealedStore
from tcomm.memory.liveness import my_identity

ELSEWHERE = msgspec.structs.replace(my_identity(), namespace="another host/1")


@pytest.fixture
def hall():
    return SealedStore(dist.HashStore(), where="the hall")


@pytest.fixture
def as_other(monkeypatch):
    """Runs a call as another process, as far as others can tell."""
    mine, local = my_identity(), threading.local()
    monkeypatch.setattr(rendezvous, "my_identity", lambda: getattr(local, "identity", mine))

    def run(identity, call):
        local.identity = identity
        try:
            return call()
        finally:
            del local.identity

    return run


def _meet_all(*calls):
    """What each call returned or raised, all of them at once."""
    told = [None] * len(calls)

    def run(index, call):
        try:
            told[index] = call()
        except Exception as error:
            told[index] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def _guest(hall, rank, world_size=2, name="g", timeout=10.0, **settings):
    return lambda: meet(SealedStore(hall.store, where=hall.where), name, rank, world_size, timeout, settings)


def test_all_get_the_same_group_and_know_whose_process_has_which_rank(hall):
    assert not is_open(hall, "g")
    meetings = _meet_all(*(_guest(hall, rank, 3) for rank in (2, 0, 1)))
    assert meetings[0] == meetings[1] == meetings[2]
    assert meetings[0].identities == (my_identity(),) * 3
    assert (is_open(hall, "g"), is_open(hall, "h")) == (True, False)


def test_the_same_processes_meet_again_and_the_store_does_not_grow(hall):
    generations, sizes = set(), []
    for _ in range(5):
        first, second = _meet_all(_guest(hall, 1), _guest(hall, 0))
        assert first == second
        generations.add(first.generation)
        sizes.append(hall.store.num_keys())
    assert len(generations) == 5
    assert sizes[1:] == [sizes[1]] * 4


def test_groups_of_several_names_do_not_meet(hall):
    names = [f"g{i}" for i in range(10)]
    calls = [_guest(hall, 0, name=n) for n in names] + [_guest(hall, 1, name=n) for n in reversed(names)]
    meetings = _meet_all(*calls)
    assert meetings[:10] == meetings[:9:-1]
    assert len({meeting.generation for meeting in meetings}) == 10


def test_whoever_did_not_come_is_named_to_all_who_did(hall):
    told = _meet_all(_guest(hall, 0, 4, timeout=0.3), _guest(hall, 2, 4, timeout=5.0))
    assert [type(error) for error in told] == [RendezvousError] * 2
    assert [str(error) for error in told] == [
        "ranks [1, 3] of 4 did not come to group 'g' at the hall within 0.3 s; check that they run, and with "
        "the same address, or give a longer store_timeout="
    ] * 2


def test_without_rank_0_that_is_told(hall):
    with pytest.raises(
        RendezvousError, match=r"ranks \[0\] of 2 did not come to group 'g' at the hall within 0.1 s"
    ):
        _guest(hall, 1, timeout=0.1)()


def test_a_failed_meeting_can_be_repeated(hall):
    with pytest.raises(RendezvousError):
        _guest(hall, 0, timeout=0.05)()
    with pytest.raises(
        RendezvousError, match=r"ranks \[0\] of 2 .* \(and before: ranks \[1\] of 2 did not come"
    ):
        _guest(hall, 1, timeout=0.05)()
    first, second = _meet_all(_guest(hall, 1), lambda: (time.sleep(0.05), _guest(hall, 0)())[1])
    assert first == second


def test_settings_that_differ_are_shown_to_all(hall):
    started = time.monotonic()
    told = _meet_all(_guest(hall, 0, a="1"), _guest(hall, 1, a="2"))
    assert time.monotonic() - started < 5
    lines = (
        "the ranks of group 'g' have different settings\n  a:\n    rank 0: '1'\n    rank 1: '2'\n"
        "make them the same"
    )
    assert [(type(error), str(error)) for error in told] == [(GroupMismatchError, lines)] * 2


def test_another_number_of_ranks_is_shown_to_all(hall):
    told = _meet_all(_guest(hall, 0, 2), _guest(hall, 2, 3))
    assert [type(error) for error in told] == [GroupMismatchError] * 2
    assert "world size:\n    rank 0: '2'\n    rank 2: '3'" in str(told[1])


def test_groups_in_another_order_are_told_as_that(hall):
    told = _meet_all(_guest(hall, 0, name="a", timeout=0.3), _guest(hall, 1, name="b", timeout=0.4))
    assert [type(error) for error in told] == [GroupMismatchError] * 2
    assert "rank 1 came to 'b': make the same groups in the same order on every rank" in str(told[0])


@pytest.mark.parametrize("complete", [False, True])
def test_a_second_process_of_a_rank_is_refused_and_the_first_is_not(hall, as_other, monkeypatch, complete):
    monkeypatch.setattr(rendezvous, "_GRACE_SECONDS", 0.1)
    second = msgspec.structs.replace(my_identity(), pid=1, start_time=1)
    calls = [_guest(hall, 0, 2 if complete else 3), _guest(hall, 1, 2 if complete else 3)]
    threads = [threading.Thread(target=_meet_all, args=(call,)) for call in calls]
    found = []
    runner = threading.Thread(target=lambda: found.extend(_meet_all(*calls)))
    runner.start()
    while not (hall.check(["group/g/open"]) and hall.store.num_keys() >= 3 + complete):
        time.sleep(0.001)
    del threads
    time.sleep(0.05)
    with pytest.raises(DuplicateRankError) as caught:
        as_other(second, _guest(hall, 1, 2 if complete else 3))
    assert "also claims rank 1 of group 'g' at the hall; give each process its own rank" in str(caught.value)
    if not complete:
        _guest(hall, 2, 3)()
    runner.join()
    assert found[0] == found[1]


def test_a_process_elsewhere_that_keeps_a_rank_is_waited_for_before_the_second_is_refused(hall, as_other):
    first, _ = _meet_all(_guest(hall, 0), lambda: as_other(ELSEWHERE, _guest(hall, 1)))
    assert first.identities[1] == ELSEWHERE
    with pytest.raises(DuplicateRankError, match=r"another process \(pid \d+ elsewhere\) also claims rank 1"):
        _guest(hall, 1, timeout=0.2)()


def test_a_rank_that_ends_before_all_have_come_is_not_waited_for(hall, as_other):
    dead = msgspec.structs.replace(my_identity(), start_time=1)
    first, second = _meet_all(_guest(hall, 0, 3), lambda: as_other(dead, _guest(hall, 1, 3)))
    assert type(first) is RendezvousError
    assert str(first) == str(second)
    assert "rank 1 (pid " in str(first)
    assert "ended before all had come" in str(first)


def test_a_rank_without_the_secret_is_told(hall):
    signing = SealedStore(hall.store, b"secret", where="the hall")
    told = _meet_all(lambda: meet(signing, "g", 0, 2, 0.5, {}), _guest(hall, 1))
    assert [type(error) for error in told] == [GroupMismatchError] * 2 or type(told[0]) is RendezvousError
    assert "rank 1 cannot come to group 'g'" in str(told[1])
    assert "give every process of the job the same TCOMM_SECRET" in str(told[1])


def test_garbage_is_an_error_of_ours(hall):
    hall.store.set("group/g/open", b"p\xc1garbage")
    with pytest.raises(GroupMismatchError, match="rank 1 cannot come to group 'g'"):
        _guest(hall, 1)()
