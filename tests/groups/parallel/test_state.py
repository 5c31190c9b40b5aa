import os
import threading

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tcomm.errors import UsageError
from tcomm.groups.all2all.surroundings import find_coordinator
from tcomm.groups.parallel import environment, parallel_state
from tcomm.groups.parallel.coordinator import GroupCoordinator
from tcomm.groups.parallel.layouts import make_layout
from tcomm.groups.parallel.parallel_config import ParallelConfig
from tcomm.groups.parallel.state import KINDS, ParallelState, current, use
from tests.groups.parallel.engine import refusal


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_that_was_not_made(kind):
    with pytest.raises(UsageError, match=f"^{KINDS[kind]} is not initialized"):
        ParallelState().group(kind)


def test_experts_need_a_model_with_experts():
    with pytest.raises(
        AssertionError, match=r"EP group is only created for MoE models with num_experts > 0\."
    ):
        ParallelState().group("ep")


def test_no_world():
    with pytest.raises(UsageError, match=r"^world group is not initialized$"):
        ParallelState().get_world()
    with pytest.raises(UsageError, match=r"^inner dp world group is not initialized$"):
        ParallelState().get_inner_dp_world()
    ParallelState().destroy()


def test_one_state_is_current_for_all_threads():
    outer, seen = current(), []
    mine = ParallelState()

    def look():
        with use(mine) as state:
            assert state is mine is current()
            thread = threading.Thread(target=lambda: seen.append(current()))
            thread.start()
            thread.join()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        look()
    assert seen == [mine]
    assert current() is outer


def _life(member):
    member.process_group()
    state = ParallelState(timeout=20)
    state.init_world(member.rank, "gloo")
    world = state.get_world()
    state.init_world(member.rank, "gloo")
    assert state.get_world() is world, "once"
    assert world.device_communicator is None
    assert state.node_count == 1
    layout = make_layout(4, tp=2, pp=2)
    state.init_model_parallel(layout, with_eplb=True)
    assert list(state.groups) == list(KINDS)
    again = refusal(state.init_model_parallel, layout)
    found = {kind: state.group(kind).ranks for kind in KINDS}
    queued = [kind for kind in KINDS if state.group(kind).mq_broadcaster is not None]
    names = state.group("tp").unique_name
    state.destroy_model_parallel()
    assert state.groups == {}
    state.init_model_parallel(layout, with_experts=False)
    assert set(KINDS) - set(state.groups) == {"ep", "eplb"}
    assert state.generation == 2
    assert state.group("tp").unique_name != names
    total = state.group("tp").all_reduce(torch.ones(1)).item()
    state.destroy()
    state.destroy()
    assert (state.world, state.inner_dp_world, state.node_count, state.groups) == (None, None, None, {})
    dist.destroy_process_group()
    return found, queued, again, total


def test_made_together_and_taken_down_together(on_ranks):
    for rank, (found, queued, again, total) in enumerate(on_ranks(4, _life)):
        layout = make_layout(4, tp=2, pp=2)
        assert found == {kind: next(r for r in getattr(layout, kind) if rank in r) for kind in KINDS}
        assert queued == ["tp"]
        assert again == ("UsageError", "tensor model parallel group is already initialized")
        assert total == 2.0


def _exchanging(member):
    """Which expert groups exchange tokens, and what their managers take for the groups around them."""
    member.process_group()
    outer = ParallelState(timeout=20)
    found = []
    with use(outer):
        outer.init_world(member.rank, "gloo")
        outer.init_model_parallel(make_layout(2, tp=2))
        found.append(outer.group("ep").device_communicator.all2all_manager)
        # Groups of a state that is not the current one are those that are being made, not the current ones.
        inner = ParallelState(timeout=20)
        inner.init_world(member.rank, "gloo")
        inner.init_model_parallel(make_layout(2, dp=2))
        manager = inner.group("ep").device_communicator.all2all_manager
        found.append((type(manager).__name__, manager.dp_group is inner.group("dp")))
        found.append(manager.tp_group is inner.group("tp"))
        found.append(
            (find_coordinator("dp") is outer.group("dp"), find_coordinator("ep") is outer.group("ep"))
        )
        with use(ParallelState()):
            found.append(find_coordinator("dp"))
        inner.destroy_model_parallel()
        inner.init_model_parallel(make_layout(2, dp=2), use_all2all=False)
        found.append(inner.group("ep").device_communicator.all2all_manager)
        inner.destroy_model_parallel()
        inner.init_model_parallel(make_layout(2, tp=2), use_all2all=True)
        found.append(inner.group("ep").device_communicator.all2all_manager is not None)
        inner.destroy()
        outer.destroy()
    dist.destroy_process_group()
    return found


def test_tokens_are_exchanged_where_there_are_replicas_or_it_is_asked_for(on_ranks):
    wanted = [None, ("AgRsAll2AllManager", True), True, (True, True), None, None, True]
    assert on_ranks(2, _exchanging) == [wanted] * 2


def _half_way(member):
    """The data parallel group cannot be made: nothing is published and nothing is left."""
    member.process_group()
    state = ParallelState(timeout=20)
    state.init_world(0, "gloo")
    groups = len(dist.distributed_c10d._world.pg_map)
    made, original = [], GroupCoordinator.__init__

    def fail_at_dp(
        self, rows, local_rank, backend, with_device, with_queue=False, name=None, *args, **options
    ):
        if name == "dp":
            raise MemoryError("no more")
        original(self, rows, local_rank, backend, with_device, with_queue, name, *args, **options)
        made.append(self)

    GroupCoordinator.__init__ = fail_at_dp
    told = refusal(state.init_model_parallel, make_layout(2, tp=2))
    GroupCoordinator.__init__ = original
    ended = [group.destroyed for group in made]
    left = len(dist.distributed_c10d._world.pg_map) - groups
    state.init_model_parallel(make_layout(2, tp=2))
    total = state.group("tp").all_reduce(torch.ones(1)).item()
    state.destroy()
    dist.destroy_process_group()
    return told, ended, left, total


def test_a_failure_half_way_leaves_nothing_behind(on_ranks):
    assert on_ranks(2, _half_way) == [(("MemoryError", "no more"), [True] * 4, 0, 2.0)] * 2


def _patched(member):
    member.process_group()
    state = ParallelState(timeout=20)
    nothing = refusal(state.patched_tp(None).__enter__)
    state.init_world(0, "gloo")
    state.init_model_parallel(make_layout(2, pp=2))
    draft = GroupCoordinator([[0, 1]], 0, "gloo", True, timeout=20)
    with state.patched_tp(draft):
        assert state.group("tp") is draft
        nested = refusal(state.patched_tp(draft).__enter__)
    with pytest.raises(ZeroDivisionError), state.patched_tp(draft):
        raise ZeroDivisionError
    with state.patched_tp(draft):
        state.destroy_model_parallel()
        assert state.group("tp") is draft
    assert not draft.destroyed, "it is its maker's"
    assert state.groups == {}
    state.init_model_parallel(make_layout(2, pp=2))
    assert refusal(state.patched_tp(None).__enter__)[0] == "UsageError"
    size = state.group("tp").world_size
    draft.destroy()
    state.destroy()
    dist.destroy_process_group()
    return nothing[0], nested, size


def test_another_tp_group_for_a_while(on_ranks):
    for found in on_ranks(2, _patched):
        assert found == ("UsageError", ("UsageError", "Should not call when it's already patched"), 1)


def _mesh(member):
    member.process_group()
    state = ParallelState(timeout=20)
    wrong = refusal(state.adopt_mesh, init_device_mesh("cpu", (4,), mesh_dim_names=("rows",)))
    assert refusal(state.adopt_mesh, None)[0] == "UsageError"
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    state.adopt_mesh(mesh)
    again = refusal(state.adopt_mesh, mesh)
    found = state.group("tp").ranks, state.group("dp").ranks, state.group("tp").mq_broadcaster is not None
    assert state.group("pp").ranks == state.group("dcp").ranks == [member.rank]
    assert refusal(state.group, "ep")[0] == "UsageError"
    with use(state):
        parallel_state.ensure_model_parallel_initialized(2, 1)
    state.destroy()
    dist.all_reduce(x := torch.ones(1), group=mesh["tp"].get_group())
    dist.destroy_process_group()
    return wrong, again, found, x.item()


def test_groups_of_a_mesh(on_ranks):
    for rank, (wrong, again, found, total) in enumerate(on_ranks(4, _mesh)):
        assert wrong[0] == again[0] == "UsageError"
        assert "needs a name out of tp, dcp" in wrong[1]
        assert found == ([rank // 2 * 2, rank // 2 * 2 + 1], [rank % 2, rank % 2 + 2], True)
        assert total == 2.0


def _torch_anew(member):
    """Somebody takes torch.distributed down, and starts it again."""
    member.process_group()
    state = ParallelState(timeout=20)
    state.init_world(0, "gloo")
    state.init_model_parallel(make_layout(2, tp=2))
    old = state.group("tp")
    dist.destroy_process_group()
    store = dist.PrefixStore("anew", member.store)
    dist.init_process_group("gloo", store=store, rank=member.rank, world_size=2)
    state.init_world(0, "gloo")
    state.init_model_parallel(make_layout(2, tp=2))
    total = state.group("tp").all_reduce(torch.ones(1)).item()
    dist.destroy_process_group()
    state.destroy()
    return old.destroyed, total, state.groups


def test_groups_of_a_world_that_is_gone_are_let_go(on_ranks):
    assert on_ranks(2, _torch_anew) == [(True, 2.0, {})] * 2


class _Stubborn:
    destroyed = 0

    def destroy(self):
        _Stubborn.destroyed += 1
        raise ValueError("not I")


def test_all_groups_are_destroyed_even_if_one_refuses():
    state = ParallelState()
    state.groups = {"tp": _Stubborn(), "pp": _Stubborn()}
    with pytest.raises(ValueError, match="not I"):
        state.destroy_model_parallel()
    assert _Stubborn.destroyed == 2
    assert state.groups == {}


def _forked(member):
    """A child drops its parent's groups, which go on."""
    member.process_group()
    state = ParallelState(timeout=20)
    state.init_world(0, "gloo")
    state.init_model_parallel(make_layout(2, tp=2))
    child = os.fork()
    if not child:
        foreign = state.is_foreign
        with use(state):
            environment.cleanup_dist_env_and_memory()
        os._exit(0 if foreign and not state.groups and state.world is None else 1)
    _, status = os.waitpid(child, 0)
    total = state.group("tp").all_reduce(torch.ones(1)).item()
    own = state.is_foreign
    state.destroy()
    dist.destroy_process_group()
    return status, total, own


def test_a_child_has_nothing_to_take_down(on_ranks):
    assert on_ranks(2, _forked) == [(0, 2.0, False)] * 2


def _replicas(member):
    """Two data parallel replicas of two hosts each, as the config tells."""
    member.process_group()
    state = ParallelState(timeout=20)
    config = ParallelConfig(
        tensor_parallel_size=2,
        data_parallel_size=2,
        data_parallel_rank=member.rank // 2,
        nnodes=4,
        node_rank=member.rank,
        distributed_executor_backend="mp",
    )
    state.init_world(0, "gloo", config)
    inner = state.get_inner_dp_world()
    found = inner.ranks, state.node_count, inner.broadcast_object(member.rank, 1)
    state.destroy()
    dist.destroy_process_group()
    return found


def test_a_replica_over_several_hosts_is_a_world_of_its_own(on_ranks):
    for rank, found in enumerate(on_ranks(4, _replicas)):
        low = rank // 2 * 2
        assert found == ([low, low + 1], 4, low + 1)
