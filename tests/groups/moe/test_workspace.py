import os

import pytest
import torch

from tcomm.errors import (
    CapabilityError,
    CollectiveMismatchError,
    ConfigError,
    GroupClosedError,
    GroupMismatchError,
    PeerTimeoutError,
)
from tcomm.groups.moe import workspace
from tcomm.groups.moe.workspace import Workspace
from tcomm.groups.setup import from_store
from tcomm.signature import CallDescription

CALL = CallDescription("turn", "int64")


def make(member, half_nbytes=4096, **kwargs):
    members = from_store(member.store, member.rank, member.world_size, "moe")
    return Workspace(members, half_nbytes, timeout=kwargs.pop("timeout", 20.0), **kwargs)


def _give(space, value, call=CALL, timeout=20.0):
    """Put a number down, and leave the call open; what the hook found goes into the list."""
    found = []

    def send():
        epoch = space.begin(call, timeout)
        space.view(space.rank, epoch, 0, (1,), torch.int64)[0] = value
        space.publish(epoch, call)

        def receive():
            space.await_peers(epoch, call)
            found.extend(
                int(space.view(rank, epoch, 0, (1,), torch.int64)[0]) for rank in range(space.world_size)
            )
            space.finish(epoch)

        return space.defer(receive)

    return space.run(send), found


def _in_two_halves(member):
    space = make(member)
    told = []
    for turn in range(6):
        hook, found = _give(space, 10 * turn + member.rank)
        assert space.is_open
        if (turn + member.rank) % 3:
            hook()
        if turn == 4:
            hook()
        assert space.is_open == (not hook.is_done)
        told.append((hook, found))
    space.run(space.drain)
    done = [hook.is_done for hook, _ in told]
    phases, half_nbytes = space.traffic.num_phases, space.half_nbytes
    space.close()
    return [found for _, found in told], done, phases, half_nbytes >= 4096


@pytest.mark.parametrize("world", [1, 2, 4])
def test_an_open_call_is_completed_by_its_hook_or_by_the_next_call(on_ranks, world):
    wanted = [[10 * turn + rank for rank in range(world)] for turn in range(6)]
    assert on_ranks(world, _in_two_halves) == [(wanted, [True] * 6, 6, True)] * world


def _errors(member):
    space = make(member, timeout=20.0)
    assert (space.seconds(), space.seconds(2.5), space.seconds("ml_inference")) == (20.0, 2.5, 600.0)
    told = []
    hook, _ = _give(space, 1, CallDescription("turn", f"of {member.rank}"))
    with pytest.raises(CollectiveMismatchError) as caught:
        hook()
    told.append("called different things" in str(caught.value))
    hook()  # once only
    hook, found = _give(space, 2)
    hook()
    told.append(found)
    member.meet("agreed")
    if member.rank == 0:
        hook, _ = _give(space, 3, timeout=0.3)
        with pytest.raises(PeerTimeoutError, match="rank 1 is silent"):
            hook()
    member.meet("late")
    space.close()
    with pytest.raises(GroupClosedError):
        space.run(lambda: None)
    return told


def test_an_open_call_fails_like_any_other(on_ranks):
    assert on_ranks(2, _errors) == [[True, [2, 2]]] * 2


def _dear(member):
    free = 64 << 20 if member.rank == 1 else 1 << 40
    workspace._free_on_host = lambda _: free
    with pytest.raises(CapabilityError) as caught:
        make(member, 16 << 20)
    return str(caught.value)


def test_buffers_that_pass_half_of_the_free_memory_of_one_rank_are_refused_on_all(on_ranks):
    first, second = on_ranks(2, _dear)
    assert first == second
    assert "rank 1: buffers of" in first
    assert f"more than half of the {64 << 20} bytes that are free" in first


def _different(member):
    found = []
    for number, changes in enumerate([{"half_nbytes": 1 << 20}, {"engine": "triton"}]):
        member.meet(f"different/{number}")
        with pytest.raises(GroupMismatchError) as caught:
            make(member, **(changes if member.rank == 1 else {}))
        found.append(str(caught.value))
    return found


def test_ranks_that_want_different_memory_or_engines_are_told(on_ranks):
    first, second = on_ranks(2, _different)
    assert first == second
    sizes, engines = first
    assert "bytes a rank:" in sizes
    assert "engine:\n    rank 0: 'cpu'\n    rank 1: 'triton'" in engines


def test_free_memory_is_that_of_the_file_system_and_of_the_machine():
    stat = os.statvfs("/dev/shm")
    assert 0 < workspace._free_on_host("/dev/shm") <= stat.f_blocks * stat.f_frsize


@pytest.mark.parametrize(
    ("device", "engine", "told"),
    [("meta", "", "'cpu' or 'cuda'"), ("cpu", "gloo", "engine='gloo'"), ("cuda", "cpu", "engine='cpu'")],
)
def test_an_engine_that_does_not_suit_the_device_is_refused(device, engine, told):
    with pytest.raises(ConfigError, match=told):
        workspace._engine_of(torch.device(device), engine)
    assert workspace._engine_of(torch.device("cuda"), "") == "triton"


@pytest.mark.parametrize("device", ["tpu", None, 3.5])
def test_a_device_that_torch_does_not_know_is_refused(device):
    with pytest.raises(ConfigError, match=f"device={device!r} is none that torch knows"):
        workspace._device_of(device)
    assert workspace._device_of("cpu") == workspace._device_of(torch.device("cpu")) == torch.device("cpu")
