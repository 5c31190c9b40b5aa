import os
import time

import torch
import torch.distributed as dist

from tcomm.groups.compiled import registry
from tcomm.groups.parallel import environment, parallel_state
from tcomm.groups.parallel.coordinator import GroupCoordinator
from tcomm.groups.parallel.making import agree_on_name, making, watch_with
from tests.groups.parallel.engine import refusal


def _make(name, rows, seconds=20.0):
    with making(name, rows, "gloo", seconds) as unique_name:
        return unique_name


def _in_different_order(member):
    """One rank makes its groups in another order, and of other members: all are told, and can go on."""
    member.process_group()
    order = refusal(_make, "pp" if member.rank else "tp", [[0, 1]])
    members = refusal(_make, "tp", [[0, 1]] if member.rank else [[0], [1]])
    name = _make("tp", [[0, 1]])
    dist.destroy_process_group()
    return order, members, name


def test_ranks_that_make_different_groups_are_told(on_ranks):
    for (kind, text), members, name in on_ranks(2, _in_different_order):
        assert kind == members[0] == "GroupMismatchError"
        assert "rank 0: 'tp'" in text
        assert "rank 1: 'pp'" in text
        assert "rank 0: '[[0], [1]]'" in members[1]
        assert name == "tp:0"


def test_without_torch_distributed():
    assert refusal(_make, "tp", [[0]])[0] == "UsageError"


def _late(member):
    """A rank that does not come is named; the others try again with it."""
    member.process_group()
    told = refusal(_make, "tp", [[0, 1]], 0.3) if member.rank == 0 else None
    member.meet("again")
    name = _make("tp", [[0, 1]])
    dist.destroy_process_group()
    return told, name


def test_a_rank_that_does_not_come_is_named_and_may_come_later(on_ranks):
    (told, first), (_, second) = on_ranks(2, _late)
    assert told[0] == "RendezvousError"
    assert told[1].startswith("ranks [1] of 2 did not come")
    assert first == second == "tp:0"


def _half_way(member):
    """Rank 1 fails in its PP group [1, 3]: ranks 0 and 2, which have theirs, are told; then it works."""
    member.process_group()
    environment.init_distributed_environment(backend="gloo", local_rank=0)
    original = GroupCoordinator._make_control

    def fail(self):
        if self.unique_name.startswith("pp") and member.rank == 1:
            raise MemoryError("no more")
        return original(self)

    GroupCoordinator._make_control = fail
    began = time.monotonic()
    told = refusal(parallel_state.initialize_model_parallel, 2, 2)
    took = time.monotonic() - began
    GroupCoordinator._make_control = original
    member.meet("again")
    parallel_state.initialize_model_parallel(2, 2)
    total = parallel_state.get_pp_group().all_reduce(torch.ones(1)).item()
    environment.cleanup_dist_env_and_memory()
    return told, took, total


def test_a_failure_half_way_is_told_to_all_and_does_not_last(on_ranks):
    found = on_ranks(4, _half_way)
    assert [told[0] for told, *_ in found] == [
        "RendezvousError",
        "MemoryError",
        "RendezvousError",
        "PeerLostError",
    ]
    for rank in (0, 2):
        assert found[rank][0][1] == "rank 1 could not make its group 'pp:0': MemoryError: no more"
    assert all(took < 10 for _, took, _ in found)
    assert [total for *_, total in found] == [2.0] * 4


def _with_a_past(member):
    """Rank 0 had a world of its own, with groups, before it met the other."""
    if member.rank == 0:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        environment.init_distributed_environment(backend="gloo", local_rank=0)
        parallel_state.initialize_model_parallel(1)
        environment.cleanup_dist_env_and_memory()
    member.process_group()
    environment.init_distributed_environment(backend="gloo", local_rank=0)
    parallel_state.initialize_model_parallel(2)
    tp = parallel_state.get_tp_group()
    tp.send_object("x", 1) if member.rank == 0 else tp.recv_object(0)
    found = tp.all_reduce(torch.ones(1)).item(), tp.unique_name
    environment.cleanup_dist_env_and_memory()
    return found


def test_processes_with_different_pasts_meet(on_ranks):
    assert on_ranks(2, _with_a_past) == [(2.0, "tp:1")] * 2


def _dies(member):
    member.process_group()
    environment.init_distributed_environment(backend="gloo", local_rank=0)
    if member.rank == 1:
        os._exit(7)
    began = time.monotonic()
    told = refusal(parallel_state.initialize_model_parallel, 3)
    return told, time.monotonic() - began


def test_a_rank_that_dies_before_it_comes_is_named_at_once(on_ranks):
    outcomes = on_ranks(3, _dies, check=False)
    for rank in (0, 2):
        (kind, text), took = outcomes[rank].value
        assert kind == "PeerLostError"
        assert "rank 1" in text
        assert took < 5


def _named(member):
    member.process_group()
    if member.rank == 0:
        registry.unique_name("ring")
    name = agree_on_name("ring", dist.group.WORLD)
    dist.destroy_process_group()
    return name


def test_the_rank_that_came_farthest_gives_the_number(on_ranks):
    assert on_ranks(2, _named) == ["ring:1"] * 2


def _watched(member):
    member.process_group()

    def look():
        raise ZeroDivisionError

    watch_with(look)
    told = refusal(_make, "tp", [[0, 1]]) if member.rank == 0 else None
    watch_with(None)
    member.meet("again")
    name = _make("tp", [[0, 1]])
    dist.destroy_process_group()
    return told, name


def test_who_waits_looks_after_the_others(on_ranks):
    (told, first), (_, second) = on_ranks(2, _watched)
    assert told[0] == "ZeroDivisionError"
    assert first == second
