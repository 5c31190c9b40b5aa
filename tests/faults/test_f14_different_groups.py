"""F14: ranks build groups in another order, or with other members."""

import time

import torch

import tcomm
from tcomm.groups.stateless.group import StatelessProcessGroup
from tests.faults.worlds import failure_of


def create(member, name, world_size=None, timeout=20.0):
    """A stateless group at the address that rank 0 tells the others, where all groups of the world meet."""
    if not member.store.check(["port"]) and member.rank == 0:
        member.first = StatelessProcessGroup.create(
            "127.0.0.1", 0, 0, member.world_size, group_name="first", via=member.store, store_timeout=20
        )
        member.store.set("port", str(member.first.opened.point.port))
    elif not hasattr(member, "first"):
        member.first = StatelessProcessGroup.create(
            "127.0.0.1", 0, member.rank, member.world_size, group_name="first", via=member.store, store_timeout=20
        )
    port = int(member.store.get("port"))
    return StatelessProcessGroup.create(
        "127.0.0.1", port, member.rank, world_size or member.world_size, group_name=name, store_timeout=timeout
    )


def _another_order(member):
    names = ["a", "b"] if member.rank == 0 else ["b", "a"]
    create(member, "same").barrier()
    failures = [failure_of(create, member, name, timeout=1.0) for name in names[:1]]
    member.meet("failed")
    # The address is as good as before.
    assert create(member, "same").all_gather_obj(member.rank) == [0, 1]
    return failures[0]


def test_f14_groups_in_another_order_are_told_on_every_rank(world):
    for rank, failure in enumerate(world(2, _another_order)):
        assert failure.kind == "GroupMismatchError"
        assert f"rank {1 - rank} came to '{'ab'[rank == 0]}'" in failure.text
        assert "make the same groups in the same order on every rank" in failure.text
        assert failure.seconds < 2.5


def _another_size(member):
    create(member, "same").barrier()
    failure = failure_of(create, member, "odd", world_size=2 if member.rank == 0 else 3)
    member.meet("failed")
    assert create(member, "same").all_gather_obj(member.rank) == [0, 1]
    return failure


def test_f14_groups_of_other_sizes_are_told_at_once_on_every_rank(world):
    for failure in world(2, _another_size):
        assert failure.kind == "GroupMismatchError"
        assert "world size:\n    rank 0: '2'\n    rank 1: '3'" in failure.text
        assert failure.seconds < 2.0


def _other_members(member):
    """One process group on each rank, of the same name, made of other ranks by either."""
    store = tcomm.groups.setup.from_store(member.store, member.rank, 2, "pair").exchange
    members = tcomm.groups.setup.Membership("pair", store, None, (0, 1) if member.rank == 0 else (0, 2))
    failure = failure_of(tcomm.groups.setup.agree_on_settings, members, tcomm.config.Config(), 20.0)
    with member.communicator() as comm:
        assert comm.all_reduce(torch.ones(1)).item() == 2.0
    return failure


def test_f14_communicators_of_other_members_are_told_on_every_rank(world):
    for failure in world(2, _other_members):
        assert failure.kind == "GroupMismatchError"
        assert "members:\n    rank 0: '(0, 1)'\n    rank 1: '(0, 2)'" in failure.text
        assert failure.seconds < 5.0


def _one_builds_none(member):
    group = create(member, "same")
    started = time.monotonic()
    failure = failure_of(create, member, "only here", timeout=0.5) if member.rank == 0 else None
    group.barrier()
    return failure, time.monotonic() - started


def test_f14_a_group_that_only_one_rank_builds_does_not_hang(world):
    (failure, _), (_, seconds) = world(2, _one_builds_none)
    assert (failure.kind, seconds < 5.0) == ("RendezvousError", True)
    assert "ranks [1] of 2 did not come to group 'only here' at the store at 127.0.0.1:" in failure.text
