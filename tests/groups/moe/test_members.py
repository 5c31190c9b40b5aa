import pytest
import torch
import torch.distributed as dist

from tcomm.errors import ConfigError
from tcomm.groups.moe.members import members_of
from tcomm.groups.stateless.group import StatelessProcessGroup


def _both_kinds(member):
    member.process_group()
    stateless = StatelessProcessGroup(
        member.rank, member.world_size, dist.PrefixStore("mine", member.store), None
    )
    told = []
    for group in (dist.group.WORLD, stateless):
        members = members_of(group, "moe/test")
        told.append(members.exchange.all_gather(bytes([member.rank]), 20.0))
        told.append((members.name, members.exchange.rank, members.process_group is group))
    dist.destroy_process_group()
    return told


def test_ranks_of_either_kind_of_group_reach_one_another(on_ranks):
    for rank, told in enumerate(on_ranks(2, _both_kinds)):
        assert told == [
            [b"\0", b"\1"], ("moe/test", rank, True), [b"\0", b"\1"], ("moe/test", rank, False),
        ]  # fmt: skip


def test_what_is_no_group():
    with pytest.raises(ConfigError, match="no process group"):
        members_of(torch.ones(1), "moe/test")
