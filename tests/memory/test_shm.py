import os
import pathlib
import stat
import time

import pytest
import torch

from tcomm.errors import CapabilityError
from tcomm.memory import shm
from tcomm.memory.base import NotShared
from tcomm.memory.liveness import hold_lock
from tcomm.memory.shm import SharedMemoryTransport


def _segments(directory):
    return sorted(name for name in os.listdir(directory) if name.startswith("tcomm-"))


def _allocates(member, directory):
    transport = SharedMemoryTransport(member.exchange("shm"), directory)
    modes, create = [], shm.Segment.create

    def spy(where, nbytes):
        segment = create(where, nbytes)
        modes.append((stat.S_IMODE(os.stat(segment.path).st_mode), os.stat(segment.path).st_size))
        return segment

    shm.Segment.create = spy
    descriptors = len(os.listdir("/proc/self/fd"))
    buffer = transport.allocate(1 << 16, 20.0)
    assert modes == [(0o600, 1 << 16)]
    assert [bool(buffer.peer(rank).any()) for rank in range(member.world_size)] == [False] * 3
    member.meet("zero")
    buffer.local[::4096] = member.rank + 1
    member.meet("written")
    seen = [int(buffer.peer(rank)[8192]) for rank in range(member.world_size)]
    assert len(os.listdir("/proc/self/fd")) == descriptors
    return seen, _segments(directory)


def test_buffers_are_zeroed_shared_private_and_nameless(on_ranks, tmp_path):
    assert on_ranks(3, _allocates, str(tmp_path)) == [([1, 2, 3], [])] * 3


def _keeps_locks(member, directory):
    transport = SharedMemoryTransport(member.exchange("shm"), directory)
    buffer, fds = transport.allocate_locked(4096, 20.0)
    member.meet("locked")
    others = [shm.is_locked(fd) for fd in fds]
    member.meet("looked")
    for fd in fds:
        os.close(fd)
    return others, buffer.nbytes


def test_each_rank_holds_the_lock_of_its_own_file(on_ranks, tmp_path):
    assert on_ranks(2, _keeps_locks, str(tmp_path)) == [([False, True], 4096), ([True, False], 4096)]


def _no_room(member, directory):
    if member.rank == 1:
        directory = f"{directory}/nowhere"
    transport = SharedMemoryTransport(member.exchange("shm"), directory)
    with pytest.raises(CapabilityError) as caught:
        transport.allocate(4096, 20.0)
    return str(caught.value)


def test_one_rank_without_room_is_everyones_error_and_leaves_nothing(on_ranks, tmp_path):
    told = on_ranks(2, _no_room, str(tmp_path))
    assert told[0] == told[1]
    assert told[0] == (
        "no shared memory of 4096 bytes a rank (rank 1: No such file or directory: needed 4096 bytes in "
        f"{tmp_path}/nowhere, available unknown); make the file system larger (docker run --shm-size, or "
        "mount -o remount,size=...), name another in TCOMM_SHM_DIR, or lower TCOMM_STAGING_BYTES"
    )
    assert _segments(tmp_path) == []


def _too_much(member):
    room = os.statvfs("/dev/shm")
    nbytes = (room.f_bavail * room.f_frsize // 4096 + 2) * 4096
    transport = SharedMemoryTransport(member.exchange("shm"))
    with pytest.raises(CapabilityError) as caught:
        transport.allocate(nbytes, 20.0)
    return nbytes, str(caught.value)


def test_too_much_memory_is_an_error_that_says_needed_and_available(on_ranks):
    (nbytes, told), _ = on_ranks(2, _too_much)
    assert f"No space left on device: needed {nbytes} bytes in /dev/shm, available " in told


def _different_directories(member, directory):
    """Each rank finds another file under the name that its peer made."""
    offer = shm.Segment.offer
    if member.rank == 1:
        shm.Segment.offer = lambda segment: shm.msgspec.structs.replace(offer(segment), inode=1)
    transport = SharedMemoryTransport(member.exchange("shm"), directory)
    made = transport.allocate(4096, 20.0)
    return isinstance(made, NotShared) and made.reason


def test_another_file_of_the_same_name_is_not_shared_memory(on_ranks, tmp_path):
    reason = (
        "the ranks share no memory (rank 0: cannot open the memory of rank 1: a different file of that name)"
    )
    assert on_ranks(2, _different_directories, str(tmp_path)) == [reason] * 2
    assert _segments(tmp_path) == []


def _another_machine(member, directory):
    if member.rank == 1:
        shm.platform.machine = lambda: "aarch64"
    made = SharedMemoryTransport(member.exchange("shm"), directory).allocate(4096, 20.0)
    return made.reason


def test_a_machine_that_does_not_order_stores_shares_nothing(on_ranks, tmp_path):
    told = on_ranks(2, _another_machine, str(tmp_path))
    assert told[0] == told[1]
    assert "rank 1: plain 8-byte stores do not publish on aarch64; only x86-64 orders them" in told[0]
    assert _segments(tmp_path) == []


def test_only_old_unlocked_names_of_ours_are_removed(tmp_path):
    prefix, old = f"tcomm-{os.getuid()}-", time.time() - 1000
    names = {"orphan": prefix + "a", "locked": prefix + "b", "young": prefix + "c"}
    names["theirs"], names["other"] = f"tcomm-{os.getuid() + 1}-d", "something"
    for name in names.values():
        (tmp_path / name).touch()
        if name != names["young"]:
            os.utime(tmp_path / name, (old, old))
    fd = os.open(tmp_path / names["locked"], os.O_RDWR)
    hold_lock(fd)
    os.utime(tmp_path / names["locked"], (old, old))
    link = tmp_path / (prefix + "link")
    link.symlink_to(tmp_path / names["other"])
    for name, hours in (("new", 23), ("old", 25)):
        verdict = tmp_path / f"{prefix[:-1]}{shm.VERDICT}{name}"
        verdict.symlink_to("commit")
        os.utime(verdict, (time.time() - 3600 * hours,) * 2, follow_symlinks=False)
    os.utime(link, (0, 0), follow_symlinks=False)
    shm.remove_orphans(str(tmp_path))
    kept = {link.name, f"{prefix}verdict-new"}
    assert set(os.listdir(tmp_path)) == set(names.values()) - {names["orphan"]} | kept
    os.close(fd)


def test_a_process_with_another_clock_removes_nothing_that_is_new(tmp_path, monkeypatch):
    prefix = f"tcomm-{os.getuid()}-"
    (tmp_path / f"{prefix}not-locked-yet").touch()
    (tmp_path / f"{prefix[:-1]}{shm.VERDICT}new").symlink_to("commit")
    real_time = time.time
    monkeypatch.setattr(time, "time", lambda: real_time() + 365 * 86400.0)
    shm.remove_orphans(str(tmp_path))
    assert len(os.listdir(tmp_path)) == 2


def test_a_file_without_room_leaves_no_name(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        shm.Segment.create(str(tmp_path), 4096)
    assert _segments(tmp_path) == []


def test_only_machines_that_keep_stores_in_order_share_memory(monkeypatch):
    for machine, told in [("x86_64", ""), ("AMD64", ""), ("aarch64", "do not publish on aarch64")]:
        monkeypatch.setattr(shm.platform, "machine", lambda machine=machine: machine)
        assert (shm.why_unordered() == "") == (told == "")
        assert told in shm.why_unordered()


def test_a_link_is_not_opened(tmp_path):
    segment = shm.Segment.create(str(tmp_path), 4096)
    offer = segment.offer()
    link = pathlib.Path(f"{segment.path}-link")
    link.symlink_to(segment.path)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        shm.Segment.open(shm.msgspec.structs.replace(offer, path=str(link)))
    mapped = segment.map(4096)
    segment.unlink()
    segment.close()
    assert torch.equal(mapped, torch.zeros(4096, dtype=torch.uint8))
