"""F14: ranks build groups in another order, or with other members."""

import torch

from tcomm.config import Config
from tcomm.groups.setup import Membership, agree_on_settings, from_store
from tests.faults.meeting import create
from tests.faults.worlds import failure_of


def _disagree(member, calls):
    """A group that some or all make otherwise, between two that all make alike."""
    first = create(member, member.rank, 2, "same")
    first.barrier()
    name, size, timeout = calls[member.rank]
    failure = failure_of(create, member, member.rank, size, name, timeout) if name else None
    member.meet("failed")
    again = create(member, member.rank, 2, "same")
    assert again.all_gather_obj(member.rank) == first.all_gather_obj(member.rank) == [0, 1]
    first.barrier()
    return failure


def test_f14_groups_in_another_order_are_told_on_every_rank(world):
    for rank, failure in enumerate(world(2, _disagree, [("a", 2, 1.0), ("b", 2, 1.0)])):
        assert failure.kind == "GroupMismatchError"
        assert f"rank {1 - rank} came to '{'ba'[rank]}'" in failure.text
        assert "make the same groups in the same order on every rank" in failure.text
        assert failure.seconds < 12.0


def test_f14_groups_of_other_sizes_are_told_at_once_on_every_rank(world):
    for failure in world(2, _disagree, [("odd", 2, 20.0), ("odd", 3, 20.0)]):
        assert failure.kind == "GroupMismatchError"
        assert "world size:\n    rank 0: '2'\n    rank 1: '3'" in failure.text
        assert failure.seconds < 12.0


def test_f14_a_group_that_only_one_rank_builds_is_not_waited_for_for_ever(world):
    failure, _ = world(2, _disagree, [("only here", 2, 0.5), ("", 0, 0.0)])
    assert failure.kind == "RendezvousError"
    assert "ranks [1] of 2 did not come to group 'only here' at the store at 127.0.0.1:" in failure.text
    assert failure.seconds < 12.0


def _other_members(member):
    exchange = from_store(member.store, member.rank, 2, "pair").exchange
    members = Membership("pair", exchange, None, (0, 1) if member.rank == 0 else (0, 2))
    failure = failure_of(agree_on_settings, members, Config(), 20.0)
    with member.communicator() as comm:
        assert comm.all_reduce(torch.ones(1)).item() == 2.0
    return failure


def test_f14_communicators_of_other_members_are_told_on_every_rank(world):
    for failure in world(2, _other_members):
        assert failure.kind == "GroupMismatchError"
        assert "members:\n    rank 0: '(0, 1)'\n    rank 1: '(0, 2)'" in failure.text
        assert failure.seconds < 5.0
