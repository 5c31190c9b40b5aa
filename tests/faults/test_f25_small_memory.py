import ctypes
import functools
import multiprocessing
import os
import shutil
import subprocess

import pytest
import torch

from tcomm.config import Config
from tests.faults.leaks import given_back
from tests.faults.worlds import failure_of, group, reduce_ones
from tests.ranks import Member

GIB = 1 << 30
CLONE_NEWNS = 0x00020000


def _more_than_there_is(directory):
    room = os.statvfs(directory)
    return (room.f_bavail * room.f_frsize + GIB) // 4096 * 4096


def _ask_for(member, kind, needed):
    os.environ["TCOMM_STAGING_BYTES"] = str(needed)
    directory = Config.from_environment().shm_dir
    with group(member, kind) as comm:
        first = failure_of(comm.all_reduce, torch.ones(4), algorithm="cpu")
        left = os.listdir(directory)
        again = failure_of(comm.all_reduce, torch.ones(4), algorithm="cpu")
        comm.barrier()
        if kind == "torch":
            reduce_ones(comm, kind)
    return first, again, left


@pytest.mark.parametrize(("kind", "world_size"), [("cpu", 2), ("cpu", 3), ("torch", 2)])
def test_f25_too_little_shared_memory_is_told_at_the_first_collective(
    world, memory_directory, kind, world_size
):
    needed = _more_than_there_is(memory_directory)
    for first, again, left in world(world_size, _ask_for, kind, needed):
        for failure in (first, again):
            assert failure.kind == "CapabilityError", failure
            assert f"needed {needed} bytes in {memory_directory}, available " in failure.text
            available = int(failure.text.partition("available ")[2].partition(")")[0].split(";")[0])
            assert 0 < available < needed
            for advice in ("--shm-size", "TCOMM_SHM_DIR", "TCOMM_STAGING_BYTES"):
                assert advice in failure.text
            assert failure.seconds < 2.0
        assert left == []
    assert os.listdir(memory_directory) == []


def _prepare_too_much(member, needed):
    with group(member) as comm:
        reduce_ones(comm)
        failure = failure_of(comm.prepare, needed)
        for numel in (4, 100_000):
            reduce_ones(comm, numel=numel)
        comm.prepare(1 << 20)
        reduce_ones(comm, numel=1000)
        return failure


def test_f25_preparing_more_than_there_is_leaves_the_old_staging(world, memory_directory):
    needed = _more_than_there_is(memory_directory)
    for failure in world(2, _prepare_too_much, needed):
        assert failure.kind == "CapabilityError", failure
        assert "available" in failure.text


@functools.cache
def _why_no_namespace():
    if os.geteuid() != 0:
        return "mounting needs root"
    for program in ("unshare", "mount"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    tried = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False
    )
    return tried.stderr.decode().strip() if tried.returncode else ""


def _in_a_small_file_system(member, size, needed, directory):
    """Two ranks, forked from this one, which has a small memory file system to itself."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", directory], check=True)
    context = multiprocessing.get_context("fork")
    with given_back():
        receiver, sender = context.Pipe(duplex=False)
        ranks = [
            context.Process(target=_in_small, args=(rank, member.store.clone(), needed, sender))
            for rank in range(2)
        ]
        for rank in ranks:
            rank.start()
        sender.close()
        told = [receiver.recv() for _ in ranks if receiver.poll(20)]
        for rank in ranks:
            rank.join(20)
        codes = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.close()
        receiver.close()
    room = os.statvfs(directory)
    return told, codes, os.listdir(directory), room.f_bavail * room.f_frsize


def _in_small(rank, store, needed, sender):
    sender.send(_ask_for(Member(rank, 2, store), "cpu", needed))


@pytest.mark.skipif(bool(_why_no_namespace()), reason=_why_no_namespace())
@pytest.mark.parametrize("share", [0.55, 0.8])
def test_f25_a_file_system_with_room_for_one_rank_only_is_too_little_for_all(world, memory_directory, share):
    size = 4 << 20
    needed = int(size * share) // 4096 * 4096
    ((told, codes, left, free),) = world(1, _in_a_small_file_system, size, needed, memory_directory)
    assert codes == [0, 0]
    assert [failure.kind for first, again, _ in told for failure in (first, again)] == ["CapabilityError"] * 4
    assert all(f"needed {needed} bytes" in first.text for first, _, _ in told)
    assert left == []
    assert free == size
