import gc
import sys
import threading
import time
import weakref

import numpy as np
import pytest
import torch

from tcomm.cpu import copies
from tcomm.cpu.copies import SHORT_BYTES, Copies, Place, has_threads_for, make_move, memcpy
from tcomm.memory.base import Staging, SymmetricBuffer
from tcomm.memory.layout import StagingLayout

MIB = 1 << 20


def use_cores(monkeypatch, num_cores, num_threads):
    monkeypatch.setattr(copies.os, "sched_getaffinity", lambda _: set(range(num_cores)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)


@pytest.mark.parametrize(
    ("nbytes", "world_size", "num_cores", "num_threads", "has"),
    [
        (MIB, 2, 4, 2, True),
        (MIB - 1, 2, 4, 2, False),
        (64 * MIB, 2, 4, 1, False),
        (64 * MIB, 2, 2, 2, False),
        (64 * MIB, 4, 2, 2, False),
        (64 * MIB, 3, 5, 8, False),
        (64 * MIB, 3, 6, 8, True),
    ],
)
def test_threads_are_for_long_copies_of_ranks_with_cores_to_spare(
    monkeypatch, nbytes, world_size, num_cores, num_threads, has
):
    use_cores(monkeypatch, num_cores, num_threads)
    assert has_threads_for(nbytes, world_size) is has


def test_a_copy_is_short_long_or_in_threads(monkeypatch):
    use_cores(monkeypatch, 4, 2)
    assert [make_move(nbytes, 2) for nbytes in (1, SHORT_BYTES, SHORT_BYTES + 1, MIB - 1, MIB)] == [
        memcpy,
        memcpy,
        copies._long_memcpy,
        copies._long_memcpy,
        copies._copy_in_threads,
    ]


@pytest.mark.parametrize(("world_size", "move"), [(2, copies._copy_in_threads), (4, copies._long_memcpy)])
def test_what_is_planned_goes_by_the_cores_of_every_rank(monkeypatch, world_size, move):
    use_cores(monkeypatch, 4, 2)
    nbytes = 4 * MIB
    buffers = [torch.empty(nbytes, dtype=torch.uint8)] * world_size
    staging = Staging(SymmetricBuffer(0, buffers), StagingLayout(nbytes, world_size))
    assert Copies(staging, 0, [Place(0, 0, 0, MIB)])._parts[0][0] is move


@pytest.mark.parametrize("move", [memcpy, copies._long_memcpy, copies._copy_in_threads])
def test_every_move_copies_its_bytes_and_no_others(move):
    source = torch.arange(100_000, dtype=torch.int32).view(torch.uint8)[3:]
    target = torch.full((400_000,), 77, dtype=torch.uint8)
    move(target.data_ptr() + 5, source.data_ptr(), 300_001)
    assert torch.equal(target[5:300_006], source[:300_001])
    assert target[:5].eq(77).all()
    assert target[300_006:].eq(77).all()


def _runs_beside(move, nbytes):
    """Whether another thread of Python gets on while this one copies."""
    x, out = torch.zeros(nbytes, dtype=torch.uint8), torch.empty(nbytes, dtype=torch.uint8)
    gate, came = threading.Lock(), []
    gate.acquire()
    interval = sys.getswitchinterval()
    thread = threading.Thread(target=lambda: (gate.acquire(), came.append(True)))
    thread.start()
    # Until it waits at the gate, and not for the GIL, which it would ask for.
    time.sleep(0.05)
    try:
        # Nobody is told to give the GIL up: only who wants to does.
        sys.setswitchinterval(1000.0)
        gate.release()
        for _ in range(300):
            move(out.data_ptr(), x.data_ptr(), nbytes)
            if came:
                break
        return bool(came)
    finally:
        sys.setswitchinterval(interval)
        thread.join()


def test_long_copies_let_other_threads_run_and_short_ones_do_not_wait_for_them():
    assert _runs_beside(make_move(4 * MIB, 1000), 4 * MIB)
    # Of this length the other thread would have the time to come.
    assert not _runs_beside(make_move(SHORT_BYTES, 1), 4 * MIB)


@pytest.mark.parametrize("length", [7, SHORT_BYTES + 5])
def test_parts_go_to_their_places_and_back_and_empty_ones_are_left_out(length):
    layout = StagingLayout(1 << 18, 2)
    buffers = [torch.full((1 << 18,), 77, dtype=torch.uint8) for _ in range(2)]
    staging = Staging(SymmetricBuffer(0, buffers), layout)
    places = [Place(1, 256, 3, length), Place(0, 64, 0, 0), Place(0, 128, length + 3, 9)]
    x = torch.arange(1 << 17, dtype=torch.int32).view(torch.uint8)[5:]
    copied = Copies(staging, 1, places)
    assert len(copied._parts) == 2
    copied.stage(x)
    half = layout.half(1)
    assert torch.equal(buffers[1][half + 256 : half + 256 + length], x[3 : 3 + length])
    assert torch.equal(buffers[0][half + 128 : half + 137], x[length + 3 : length + 12])
    assert sum(int(buffer.ne(77).sum()) for buffer in buffers) <= length + 9
    out = torch.full((length + 20,), 88, dtype=torch.uint8)
    copied.fetch(out)
    assert torch.equal(out[3 : length + 12], x[3 : length + 12])
    assert out[:3].eq(88).all()
    assert out[length + 12 :].eq(88).all()


def _copies_and_memory(num_places):
    """Copies, and whether the memory of their staging is still there."""
    layout = StagingLayout(1 << 18, 1)
    memory = np.zeros(1 << 18, dtype=np.uint8)
    staging = Staging(SymmetricBuffer(0, [torch.from_numpy(memory)]), layout)
    return Copies(staging, 0, [Place(0, 64 * n, 8 * n, 8) for n in range(num_places)]), weakref.ref(memory)


@pytest.mark.parametrize("num_places", [1, 2])
@pytest.mark.parametrize("direction", ["stage", "fetch"])
def test_memory_lives_as_long_as_what_copies_to_it_and_no_longer(direction, num_places):
    gc.disable()
    try:
        copies, memory = _copies_and_memory(num_places)
        copy = getattr(copies, direction)
        del copies
        assert memory() is not None
        copy(torch.zeros(64, dtype=torch.uint8))
        del copy
        assert memory() is None
    finally:
        gc.enable()
