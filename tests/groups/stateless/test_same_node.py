import os

import pytest
import torch.distributed as dist

from tcomm.errors import ConfigError
from tcomm.groups.stateless.group import StatelessProcessGroup
from tcomm.groups.stateless.same_node import count_nodes, gather_bytes, in_the_same_node_as, place_of


def _ask(member, kind, directories):
    os.environ["TCOMM_SHM_DIR"] = directories[member.rank]
    if kind == "stateless":
        group = StatelessProcessGroup(member.rank, member.world_size, member.store, None, store_timeout=20.0)
    else:
        member.process_group()
        group = dist.group.WORLD
    answers = [in_the_same_node_as(group, source, timeout=20.0) for source in range(member.world_size)]
    nodes = count_nodes(group, timeout=20.0)
    with pytest.raises(ConfigError, match="source_rank=3"):
        in_the_same_node_as(group, 3)
    assert place_of(group) == (member.rank, member.world_size)
    assert gather_bytes(group, b"x" * member.rank, 20.0) == [b"", b"x", b"xx"]
    return answers, nodes


@pytest.mark.parametrize("kind", ["stateless", "gloo"])
def test_ranks_of_one_node_and_a_rank_that_cannot_make_its_file(on_ranks, tmp_path, kind):
    """A rank that cannot make the file is alone as a source, and nobody waits for it."""
    directories = [str(tmp_path), "/nowhere", str(tmp_path)]
    told = on_ranks(3, _ask, kind, directories)
    assert told[0] == told[1] == told[2]
    answers, nodes = told[0]
    assert answers == [[True, True, True], [False, True, False], [True, True, True]]
    assert nodes == 1
    assert os.listdir(tmp_path) == []


def _apart(member, tmp_path):
    from tcomm.groups.stateless import same_node

    if member.rank % 2:
        # Another node: the names of the others are not there.
        same_node.Segment.open = staticmethod(lambda offer: (_ for _ in ()).throw(FileNotFoundError()))
        os.environ["TCOMM_SHM_DIR"] = "/nowhere"
    else:
        os.environ["TCOMM_SHM_DIR"] = tmp_path
    group = StatelessProcessGroup(member.rank, member.world_size, member.store, None, store_timeout=20.0)
    return in_the_same_node_as(group), count_nodes(group)


def test_ranks_that_share_no_memory_are_apart(on_ranks, tmp_path):
    assert on_ranks(4, _apart, str(tmp_path)) == [([True, False, True, False], 3)] * 4


def test_alone_is_one_node():
    group = StatelessProcessGroup(0, 1, dist.HashStore(), None)
    assert (in_the_same_node_as(group), count_nodes(group)) == ([True], 1)


def test_a_group_without_a_backend_for_the_cpu_is_refused():
    with pytest.raises(ConfigError) as caught:
        in_the_same_node_as(dist.ProcessGroup(0, 2))
    assert str(caught.value) == "in_the_same_node_as should be tested with a non-NCCL group."
