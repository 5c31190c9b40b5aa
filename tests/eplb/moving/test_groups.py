import pytest
import torch.distributed as dist

from tcomm.eplb.moving.groups import members_that_move, rank_of, size_of
from tcomm.errors import ConfigError
from tcomm.groups.parallel.coordinator import GroupCoordinator
from tcomm.groups.stateless.group import StatelessProcessGroup


def _each_kind(member):
    member.process_group()
    groups = [
        dist.group.WORLD,
        StatelessProcessGroup(member.rank, 2, dist.PrefixStore("stateless", member.store), None),
        GroupCoordinator.from_process_group(dist.group.WORLD, group_name="ep", timeout=20),
    ]
    told = [(size_of(group), rank_of(group)) for group in groups]
    for group in groups:
        members = members_that_move(group)
        exchange = members.exchange
        told.append((members.name, exchange.all_gather(bytes([member.rank]), 20.0)))
    groups[-1].destroy()
    return told


def test_every_kind_of_group_tells_its_ranks(on_ranks):
    for rank, told in enumerate(on_ranks(2, _each_kind)):
        assert told == [(2, rank)] * 3 + [("experts", [b"\0", b"\1"])] * 3


def test_what_is_no_group_is_refused():
    for call in (size_of, rank_of, members_that_move):
        with pytest.raises(ConfigError, match="'ep' is no expert parallel group of this rank"):
            call("ep")
