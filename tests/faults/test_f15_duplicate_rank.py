"""F15: two processes claim one rank. The second is refused; the first is not affected."""

import pytest

from tcomm.groups.stateless.group import StatelessProcessGroup
from tcomm.groups.stateless.stores import create_tcp_store
from tests.faults.worlds import failure_of


def _address(member):
    """Where rank 0 listens; its socket has to be made by then."""
    member.meet("listening")
    return int(member.store.get("port"))


def _second_of_rank_1(member, complete):
    """Processes 1 and 2 claim rank 1: one after the other, before or after the group is complete."""
    size = 2 if complete else 3
    if member.rank == 0:
        port = create_tcp_store("127.0.0.1", 0, is_master=True).port
        member.store.set("port", str(port))
    port = _address(member)

    def create(rank):
        return StatelessProcessGroup.create("127.0.0.1", port, rank, size, store_timeout=20)

    if member.rank == 2:
        member.meet("first came") if complete else member.store.wait(["claimed"])
        failure = failure_of(create, 1)
        if not complete:
            create(2).barrier()
        member.meet("refused")
        return failure
    group = create(member.rank) if complete else None
    if complete:
        group.barrier()
        member.meet("first came")
        assert group.all_gather_obj(member.rank) == [0, 1]
    else:
        if member.rank == 1:
            member.store.set("claimed", "soon")
        group = create(member.rank)
        group.barrier()
    member.meet("refused")
    if complete:
        assert group.all_gather_obj(member.rank) == [0, 1]
    return "unaffected"


def test_f15_a_second_process_is_refused_once_the_group_is_complete(world):
    first, second, failure = world(3, _second_of_rank_1, True)
    assert (first, second, failure.kind) == ("unaffected", "unaffected", "DuplicateRankError")
    assert ", running) also claims rank 1 of group 'stateless' at the store at 127.0.0.1:" in failure.text
    assert "give each process its own rank" in failure.text
    assert failure.seconds < 3.0


def _both_at_once(member):
    """Processes 1 and 2 claim rank 1 of 3 at once: one is refused, and comes as rank 2."""
    if member.rank == 0:
        group = StatelessProcessGroup.create("127.0.0.1", 0, 0, 3, store_timeout=20, via=_Telling(member))
        return group.all_gather_obj("zero")
    member.meet_those = None
    while not member.store.check(["port"]):
        pass
    port = int(member.store.get("port"))
    try:
        group = StatelessProcessGroup.create("127.0.0.1", port, 1, 3, store_timeout=20)
        told = "first"
    except Exception as error:
        told = type(error).__name__
        group = StatelessProcessGroup.create("127.0.0.1", port, 2, 3, store_timeout=20)
    group.all_gather_obj(told)
    return told


class _Telling:
    """A store by which rank 0 tells its port to whoever asks."""

    def __init__(self, member):
        self._member = member

    def set(self, key, value):
        self._member.store.set("port", value[1:])


def test_f15_of_two_at_once_one_is_refused_and_the_group_comes_together(world):
    everyone, *others = world(3, _both_at_once)
    assert sorted(others) == ["DuplicateRankError", "first"]
    assert everyone == ["zero", "first", "DuplicateRankError"]


def _second_rank_0(member):
    if member.rank == 0:
        group = StatelessProcessGroup.create("127.0.0.1", 0, 0, 2, store_timeout=20, via=_Telling(member))
        group.barrier()
        member.meet("refused")
        return group.all_gather_obj(0)
    while not member.store.check(["port"]):
        pass
    port = int(member.store.get("port"))
    if member.rank == 1:
        group = StatelessProcessGroup.create("127.0.0.1", port, 1, 2, store_timeout=20)
        group.barrier()
        member.meet("refused")
        return group.all_gather_obj(1)
    while failure_of(StatelessProcessGroup.create, "127.0.0.1", port, 0, 2, store_timeout=5).kind == "OSError":
        pass
    failure = failure_of(StatelessProcessGroup.create, "127.0.0.1", port, 0, 2, store_timeout=5)
    member.meet("refused")
    return failure


def test_f15_a_second_rank_0_is_refused(world):
    first, second, failure = world(3, _second_rank_0)
    assert first == second == [0, 1]
    assert failure.kind == "DuplicateRankError"
    assert "another process also claims rank 0 of group 'stateless' at 127.0.0.1:" in failure.text
    assert failure.seconds < 3.0
