import pytest
import torch
import torch.distributed as dist

from tcomm.errors import UsageError
from tcomm.groups.parallel.process_groups import ProcessGroups, device_of, find_my_ranks


def test_my_ranks_are_the_row_that_i_am_in():
    assert find_my_ranks([[2, 0], [1]], 0, 3) == [2, 0]
    assert find_my_ranks([[2, 0], [1]], 1, 3) == [1]


@pytest.mark.parametrize("rows", [[[0, 1]], [[0], [1], [1, 2]], [[0, 1, 2, 3]]])
def test_rows_have_to_divide_the_world(rows):
    with pytest.raises(UsageError, match="each of the 3 ranks must be in exactly one group"):
        find_my_ranks(rows, 0, 3)


def test_the_device_follows_the_backend(monkeypatch):
    assert device_of("gloo", 1) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of("gloo", 1) == torch.device("cpu")
    assert device_of("nccl", 1) == torch.device("cuda", 1)


def _life(member):
    member.process_group()
    made = ProcessGroups.create([member.rank], "gloo", f"mine{member.rank}", None)
    known = len(dist.distributed_c10d._world.pg_map)
    names = [group.group_desc for group in (made.device_group, made.cpu_group)]
    adopted = ProcessGroups.adopt(dist.group.WORLD, "world", 5.0)
    adopted.destroy()
    made.destroy()
    made.destroy()
    gone = known - len(dist.distributed_c10d._world.pg_map)
    dist.all_reduce(x := torch.ones(1))
    dist.destroy_process_group()
    return names, gone, adopted.cpu_group is adopted.device_group, x.item()


def test_groups_are_made_by_their_members_and_end_with_their_maker(on_ranks):
    for rank, found in enumerate(on_ranks(2, _life)):
        assert found == ([f"mine{rank}/device", f"mine{rank}/cpu"], 2, True, 2.0)
