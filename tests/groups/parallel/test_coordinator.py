import gc
import pathlib

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tcomm.groups.compiled import ops, registry
from tcomm.groups.parallel.coordinator import GroupCoordinator
from tests.groups.parallel.engine import coordinator, refusal

RING = {
    0: {"ranks": [0, 2], "next": 2, "prev": 2, "first": True, "last": False},
    1: {"ranks": [1], "next": 1, "prev": 1, "first": True, "last": True},
    2: {"ranks": [0, 2], "next": 0, "prev": 0, "first": False, "last": True},
}


def _places(member):
    with coordinator(member, rows=[[0, 2], [1]], name="ring") as group:
        assert group.unique_name == "ring:0"
        assert (group.rank, group.world_size) == (member.rank, len(group.ranks))
        assert group.ranks[group.rank_in_group] == member.rank
        assert (group.first_rank, group.last_rank) == (group.ranks[0], group.ranks[-1])
        assert group.local_rank == member.rank
        assert group.device == torch.device("cpu")
        assert dist.get_process_group_ranks(group.cpu_group) == group.ranks
        assert dist.get_backend(group.device_group) == "gloo"
        assert group.group_ranks == [[0, 2], [1]]
        assert "'ring:0' rank" in repr(group)
        return {
            "ranks": group.ranks,
            "next": group.next_rank,
            "prev": group.prev_rank,
            "first": group.is_first_rank,
            "last": group.is_last_rank,
        }


def test_places_in_groups_of_different_length(on_ranks):
    assert dict(enumerate(on_ranks(3, _places))) == RING


def _wrong_rows(member):
    early = "torch.distributed is not initialized; call init_distributed_environment() first"
    assert refusal(GroupCoordinator, [[0, 1]], 0, "gloo", True) == ("UsageError", early)
    assert refusal(GroupCoordinator.from_process_group, None) == ("UsageError", early)
    member.process_group()
    before = len(dist.distributed_c10d._world.pg_map)
    told = [
        refusal(GroupCoordinator, rows, member.rank, "gloo", True)
        for rows in ([[0]], [[0, 1], [1]], [[0, 1, 2]])
    ]
    _check_wrong_arguments()
    assert len(dist.distributed_c10d._world.pg_map) == before, "nothing was made"
    group = GroupCoordinator(np.arange(2).reshape(1, 2), np.int64(member.rank), "gloo", True, timeout=20)
    assert {type(rank) for row in [group.ranks, *group.group_ranks] for rank in row} == {int}
    assert type(group.local_rank) is int
    group.destroy()
    dist.destroy_process_group()
    return told


def _check_wrong_arguments():
    right = {"group_ranks": [[0, 1]], "local_rank": 0, "torch_distributed_backend": "gloo"}
    for wrong in (
        *[{"group_ranks": rows} for rows in (None, [0, 1], [["a"]], [[True, False]], [[0, 1], []], "01")],
        *[{"local_rank": number} for number in (None, "x", 1.0, True, -2)],
        *[{"torch_distributed_backend": backend} for backend in (None, 5, "nope", "cpu:gloo,cuda:nope")],
        {"group_name": 5},
    ):
        kind, text = refusal(GroupCoordinator, use_device_communicator=True, **right | wrong)
        assert kind == "UsageError", wrong
        assert repr(*wrong.values()) in text
    for wrong in (None, "x", 3, dist.GroupMember.NON_GROUP_MEMBER):
        assert "is no process group" in refusal(GroupCoordinator.from_process_group, wrong)[1]
    world = dist.group.WORLD
    assert refusal(lambda: GroupCoordinator.from_process_group(world, local_rank="x"))[0] == "UsageError"
    assert refusal(lambda: GroupCoordinator.from_process_group(world, group_name=3))[0] == "UsageError"


def test_rows_that_do_not_divide_the_world_make_nothing(on_ranks):
    for told in on_ranks(2, _wrong_rows):
        assert [kind for kind, _ in told] == ["UsageError"] * 3
        assert "leaves out [1]" in told[0][1]
        assert "names some twice" in told[1][1]


def _ends(member):
    with coordinator(member, with_queue=True) as group:
        name, control = group.unique_name, group.control
        sibling = group.make_sibling_device_group("spare")
        x = torch.ones(2)
        dist.all_reduce(x, group=sibling)
        assert x.tolist() == [2.0, 2.0]
        assert registry.find_group(name) is group
        groups = len(dist.distributed_c10d._world.pg_map)
        group.destroy()
        group.destroy()
        assert "destroyed" in repr(group)
        assert len(dist.distributed_c10d._world.pg_map) == groups - 3
        assert group.device_communicator is group.control is group.mq_broadcaster is None
        assert refusal(control.barrier)[0] == "GroupClosedError"
        assert refusal(ops.all_reduce, x, name) == ("ConfigError", f"Group {name} is destroyed.")
        for call in (group.barrier, group.all_reduce):
            assert refusal(call, *([x] if call == group.all_reduce else []))[0] == "ConfigError"
        gone = "ConfigError", f"Group {name} is destroyed."
        for call in (group.make_sibling_device_group, group.graph_capture().__enter__):
            assert refusal(call) == gone
        assert refusal(group.prepare_communication_buffer_for_model, torch.nn.Linear(1, 1)) == gone
    del group, control
    gc.collect()
    return [line for line in pathlib.Path("/proc/self/maps").read_text().splitlines() if "tcomm" in line]


def test_the_end_gives_everything_back(on_ranks):
    assert on_ranks(2, _ends) == [[]] * 2


def _adopted(member):
    member.process_group()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    told = refusal(GroupCoordinator.from_process_group, mesh)
    group = GroupCoordinator.from_process_group(mesh["tp"], group_name="tp", timeout=20)
    total = group.all_reduce(torch.full((1,), float(member.rank))).item()
    said = group.broadcast_object(member.rank, 1)
    group.destroy()
    dist.all_reduce(x := torch.ones(1), group=mesh["tp"].get_group())
    world = GroupCoordinator.from_process_group(
        dist.group.WORLD, local_rank=5, use_message_queue_broadcaster=True, timeout=20
    )
    everybody = world.broadcast_object(member.rank, 2), world.local_rank, world.unique_name, world.local_rank
    world.destroy()
    dist.destroy_process_group()
    return told[0], total, said, x.item(), everybody


def test_a_mesh_and_a_process_group_are_adopted_and_stay(on_ranks):
    for rank, found in enumerate(on_ranks(4, _adopted)):
        low = rank // 2 * 2
        assert found == ("UsageError", 2.0 * low + 1, low + 1, 2.0, (2, 5, "anonymous:0", 5))


class FusedMoE(torch.nn.Module):
    calls = 0

    def maybe_init_modular_kernel(self):
        FusedMoE.calls += 1


def _captures(member, name):
    with coordinator(member, name=name) as group:
        with group.graph_capture() as context:
            assert context.stream is None, "nothing is captured on a CPU"
            total = group.all_reduce(torch.ones(1)).item()
        with group.graph_capture(context) as again:
            assert again is context
        assert "is a GraphCaptureContext or None, not 'x'" in refusal(group.graph_capture("x").__enter__)[1]
        for wrong in (None, FusedMoE):
            assert refusal(group.prepare_communication_buffer_for_model, wrong)[0] == "ConfigError"
        group.prepare_communication_buffer_for_model(torch.nn.Sequential(FusedMoE(), torch.nn.Linear(1, 1)))
        return total, FusedMoE.calls


@pytest.mark.parametrize(("name", "calls"), [("ep", 1), ("prep", 0)])
def test_capture_and_preparation(on_ranks, name, calls):
    assert on_ranks(2, _captures, name) == [(2.0, calls)] * 2


def _half_way(member):
    """A queue that cannot be made leaves no group behind."""
    member.process_group()
    GroupCoordinator.create_mq_broadcaster = lambda *_: 1 / 0
    before = len(dist.distributed_c10d._world.pg_map)
    told = refusal(GroupCoordinator, [[0, 1]], 0, "gloo", True, True, "tp", timeout=20)
    left = len(dist.distributed_c10d._world.pg_map) - before
    dist.destroy_process_group()
    return told[0], left


def test_a_failure_half_way_leaves_nothing(on_ranks):
    assert on_ranks(2, _half_way) == [("ZeroDivisionError", 0)] * 2
