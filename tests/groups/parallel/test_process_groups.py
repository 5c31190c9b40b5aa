import pytest
import torch
import torch.distributed as dist

from tcomm.errors import CapabilityError, UsageError
from tcomm.groups.parallel.process_groups import (
    ProcessGroups,
    device_of,
    find_my_ranks,
    new_process_group,
    resolve_local_rank,
)
from tests.groups.parallel.engine import refusal


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
    made = ProcessGroups.create([[0], [1]], "gloo", "mine", None)
    known = len(dist.distributed_c10d._world.pg_map)
    names = [group.group_desc for group in (made.device_group, made.cpu_group)]
    adopted = ProcessGroups.adopt(dist.group.WORLD)
    adopted.destroy()
    made.destroy()
    made.destroy()
    gone = known - len(dist.distributed_c10d._world.pg_map)
    dist.all_reduce(x := torch.ones(1))
    dist.destroy_process_group()
    return names, gone, adopted.cpu_group is adopted.device_group, x.item()


def _again(member):
    """Ranks in another order, made and ended twice."""
    member.process_group()
    found = []
    for _ in range(2):
        made = ProcessGroups.create([[0, 2, 1]], "gloo", "turned", 20.0)
        gathered = [torch.zeros(1) for _ in range(3)]
        dist.all_gather(gathered, torch.full((1,), float(member.rank)), group=made.cpu_group)
        found.append([int(x) for x in gathered])
        made.destroy()
    told = refusal(new_process_group, [[1]], "gloo", "", None)[0] if member.rank == 0 else "UsageError"
    dist.destroy_process_group()
    return found, told


def test_groups_keep_the_order_of_their_row_and_can_be_made_again(on_ranks):
    assert on_ranks(3, _again) == [([[0, 2, 1]] * 2, "UsageError")] * 3


def test_the_local_rank_is_what_was_given_or_the_environments(monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 7)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert [resolve_local_rank(2), resolve_local_rank(-1)] == [2, 7]
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert resolve_local_rank(-1) == 3


def test_a_torch_that_sorts_is_told(monkeypatch):
    monkeypatch.setattr(dist, "new_group", lambda ranks, timeout, backend, group_desc: None)
    with pytest.raises(CapabilityError, match="groups in another order need torch"):
        new_process_group([[1, 0]], "gloo", "", None)


def test_groups_are_made_by_their_members_and_end_with_their_maker(on_ranks):
    for found in on_ranks(2, _life):
        assert found == (["mine/device", "mine/cpu"], 2, True, 2.0)
