import os
import pathlib
import signal
import time

import pytest
import torch

from tcomm.groups import handle
from tcomm.memory import arena, shm
from tcomm.memory.liveness import hold_lock
from tests.faults.leaks import given_back
from tests.faults.worlds import failure_of, group, reduce_ones

VICTIM = 1
SETUP_SECONDS = 0.8
OLD_SECONDS = 3600


def _kill_myself(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_at_creation(number):
    """Die with the `number`-th segment made and its name still there."""
    create, made = shm.Segment.create.__func__, []

    def create_and_die(cls, directory, nbytes):
        segment = create(cls, directory, nbytes)
        made.append(segment)
        if len(made) == number:
            _kill_myself()
        return segment

    shm.Segment.create = classmethod(create_and_die)


def _die_in_rendezvous(member, where):
    assert handle.SETUP_SECONDS > SETUP_SECONDS
    handle.SETUP_SECONDS = SETUP_SECONDS
    if member.rank == VICTIM:
        if where == "segment":
            _kill_at_creation(1)
        elif where == "mailboxes":
            _kill_at_creation(2)
        elif where == "hello":
            arena.my_identity = _kill_myself
        else:
            arena.ControlPage.matches = _kill_myself
    with given_back():
        return failure_of(member.communicator)


def _survivor(outcomes):
    assert outcomes[VICTIM].exitcode == -signal.SIGKILL
    assert not outcomes[0].error, outcomes[0].error
    return outcomes[0].value


def _forget(directory, expected):
    names = os.listdir(directory)
    assert len(names) == expected, names
    for name in names:
        os.unlink(f"{directory}/{name}")


@pytest.mark.parametrize(("where", "left"), [("segment", 1), ("hello", 0), ("verdict", 0), ("mailboxes", 1)])
def test_f26_a_rank_killed_in_rendezvous_is_missed_at_the_deadline(world, memory_directory, where, left):
    failure = _survivor(world(2, _die_in_rendezvous, where, check=False, timeout=15.0))
    assert failure.kind in ("RendezvousError", "PeerLostError"), failure
    assert failure.seconds < SETUP_SECONDS + 1.5
    if failure.kind == "RendezvousError":
        assert f"ranks [{VICTIM}] of 2 did not come" in failure.text
        assert f"within {SETUP_SECONDS:g} s" in failure.text
    _forget(memory_directory, left)


def _die_while_staging_is_made(member):
    if member.rank == VICTIM:
        _kill_at_creation(3)
    with group(member) as comm:
        failure = failure_of(comm.all_reduce, torch.ones(4))
        again = failure_of(comm.all_reduce, torch.ones(4))
    return failure, again


def test_f26_a_rank_killed_while_staging_is_made_is_named_at_once(world, memory_directory):
    failure, again = _survivor(world(2, _die_while_staging_is_made, check=False))
    assert (failure.kind, failure.peers, failure.rank) == ("PeerLostError", (VICTIM,), 0)
    assert failure.op == "all_reduce"
    assert failure.seconds < 2.0
    assert (again.kind, again.peers) == ("PeerLostError", (VICTIM,))
    assert again.seconds < 0.5
    _forget(memory_directory, 1)


def _use_a_group(member):
    with group(member) as comm:
        reduce_ones(comm)


def _age(path, seconds=OLD_SECONDS):
    os.utime(path, (time.time() - seconds, time.time() - seconds))


def test_f26_the_name_of_a_killed_rank_is_removed_by_the_next_group_once_it_is_old(world, memory_directory):
    _survivor(world(2, _die_in_rendezvous, "segment", check=False, timeout=15.0))
    (orphan,) = pathlib.Path(memory_directory).iterdir()
    world(2, _use_a_group)
    assert orphan.exists()
    _age(orphan)
    world(2, _use_a_group)
    assert not orphan.exists()


def test_f26_a_name_that_somebody_holds_or_that_is_not_ours_is_never_removed(world, memory_directory):
    mine = f"{memory_directory}/{shm._PREFIX}{os.getuid()}-"
    others = [f"{memory_directory}/{shm._PREFIX}{os.getuid() + 1}-abc", f"{memory_directory}/psm_abc"]
    for path in others:
        pathlib.Path(path).touch()
        _age(path)
    pathlib.Path(mine + "orphan").touch()
    _age(mine + "orphan")
    descriptor = os.open(mine + "held", os.O_CREAT | os.O_RDWR)
    try:
        hold_lock(descriptor)
        _age(mine + "held")
        world(2, _use_a_group)
        assert sorted(os.listdir(memory_directory)) == sorted(map(os.path.basename, [*others, mine + "held"]))
    finally:
        os.close(descriptor)
    world(2, _use_a_group)
    assert not os.path.exists(mine + "held")
    _forget(memory_directory, len(others))


def _collect_names(member):
    fresh = set()
    create = shm.Segment.create.__func__

    def remember(cls, directory, nbytes):
        segment = create(cls, directory, nbytes)
        fresh.add(os.path.basename(segment.path))
        return segment

    shm.Segment.create = classmethod(remember)
    _use_a_group(member)
    return fresh


def test_f26_every_segment_has_a_new_name(world):
    first, second = world(2, _collect_names), world(2, _collect_names)
    names = [name for fresh in (*first, *second) for name in fresh]
    assert len(names) == len(set(names)) == 12
