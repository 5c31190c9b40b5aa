"""F15: two processes claim one rank. The second is refused; the first is not affected."""

from tcomm.errors import DuplicateRankError
from tests.faults.meeting import create
from tests.faults.worlds import failure_of


def _after(member, rank):
    """Process 2 claims the rank of another one when the group of the two others is complete."""
    if member.rank == 2:
        member.meet("complete")
        failure = failure_of(create, member, rank, 2)
        member.meet("refused")
        return failure
    group = create(member, member.rank, 2)
    group.barrier()
    member.meet("complete")
    before = group.all_gather_obj(member.rank)
    member.meet("refused")
    after = group.all_gather_obj(member.rank)
    group.barrier()
    return before, after


def test_f15_a_second_process_is_refused_once_the_group_is_complete(world):
    first, second, failure = world(3, _after, 1)
    assert first == second == ([0, 1], [0, 1])
    assert failure.kind == "DuplicateRankError"
    assert ", running) also claims rank 1 of group 'g' at the store at 127.0.0.1:" in failure.text
    assert "give each process its own rank" in failure.text
    assert failure.seconds < 12.0


def test_f15_a_second_rank_0_is_refused(world):
    first, second, failure = world(3, _after, 0)
    assert first == second == ([0, 1], [0, 1])
    assert failure.kind == "DuplicateRankError"
    assert "another process also claims rank 0 of group 'g' at 127.0.0.1:" in failure.text
    assert failure.seconds < 12.0


def _at_once(member):
    """Processes 1 and 2 claim rank 1 of 3 at once; the one that is refused comes again as rank 2."""
    told = "zero" if member.rank == 0 else "first"
    try:
        group = create(member, min(member.rank, 1), 3)
    except DuplicateRankError:
        told = "second"
        group = create(member, 2, 3)
    everyone = group.all_gather_obj(told)
    group.barrier()
    return told, everyone


def test_f15_of_two_at_once_one_is_refused_and_the_group_comes_together(world):
    results = world(3, _at_once)
    assert sorted(told for told, _ in results) == ["first", "second", "zero"]
    assert [everyone for _, everyone in results] == [["zero", "first", "second"]] * 3
