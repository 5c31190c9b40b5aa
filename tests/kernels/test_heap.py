import ctypes
import inspect
import time

import pytest
import torch
import triton
import triton.language as tl

from tcomm.errors import PeerTimeoutError
from tcomm.kernels import device_nvshmem, heap
from tcomm.kernels.device_nvshmem import (
    BINDINGS,
    CMP_EQ,
    CMP_GE,
    SIGNAL_ADD,
    SIGNAL_SET,
    barrier,
    fence,
    get,
    my_pe,
    n_pes,
    ptr,
    put,
    put_signal,
    quiet,
    signal_op,
    signal_wait_until,
)
from tcomm.kernels.hooks import interpreting
from tcomm.memory.control import arrival_index
from tcomm.memory.shm import SharedMemoryTransport
from tcomm.signature import CallDescription


def test_every_binding_has_a_twin_with_as_many_arguments():
    for binding in BINDINGS:
        twin = getattr(heap, binding.name)
        assert getattr(device_nvshmem, binding.name) is twin
        assert len(inspect.signature(twin).parameters) == len(binding.arguments), binding.name


def test_every_binding_is_exported_and_is_in_the_table_once():
    names = [binding.name for binding in BINDINGS]
    assert len(set(names)) == len(names)
    assert set(names) < set(device_nvshmem.__all__)
    assert set(names) < set(heap.__all__)


@triton.jit
def _ring_kernel(mine, signal, far_signal, x_ptr, out_ptr, pe_ptr, nbytes, PES: tl.constexpr):
    """x to the next PE with a signal; what came from the last one, and a word read back from the next."""
    to = (my_pe() + 1) % PES
    put(mine + 1024, x_ptr.to(tl.int64), nbytes, to)
    fence()
    put_signal(mine, x_ptr.to(tl.int64), nbytes, far_signal, 7, SIGNAL_SET, to)
    seen = signal_wait_until(signal, CMP_EQ, 7)
    tl.store(pe_ptr, seen + 0)
    tl.store(pe_ptr + 1, tl.full((), 0, tl.int64) + my_pe() * 10 + n_pes())
    values = tl.load(mine.to(tl.pointer_type(tl.int64)) + tl.arange(0, 4))
    tl.store(out_ptr + tl.arange(0, 4), values)
    get(out_ptr.to(tl.int64) + 32, mine + 1024, nbytes, to)
    signal_op(mine + 2048, 5, SIGNAL_ADD, to)
    signal_op(mine + 2048, 6, SIGNAL_ADD, (to + 1) % PES)
    quiet()
    barrier()


def _heap_of(member, arena):
    sync = SharedMemoryTransport(member.exchange("sync")).allocate(4096, 20.0)
    return heap.Heap(member.rank, range(member.world_size), arena.control, [arena.staging.buffer], sync=sync)


def _free(arena):
    """Address of this rank's zeroed staging."""
    return int(arena.staging.buffer.table[arena.rank]) + arena.staging.layout.half_offset


def _ring(member):
    arena = member.arena()
    rank, world = member.rank, member.world_size
    page = arena.control.table
    x = torch.arange(4) + 100 * rank
    out, told = torch.zeros(8, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    source = (rank - 1) % world
    arena.channel.begin(CallDescription("ring"), 20.0)
    with interpreting(arena.channel), heap.mapped(_heap_of(member, arena)):
        _ring_kernel[(1,)](
            _free(arena),
            int(page[rank]) + 8 * arrival_index(0, 1, 0, source),
            int(page[rank]) + 8 * arrival_index(0, 1, 0, rank),
            x, out, told, 32, PES=world,
        )  # fmt: skip
    added = ctypes.c_int64.from_address(_free(arena) + 2048).value
    return out.tolist(), told.tolist(), added


def test_a_ring_of_puts_signals_gets_and_a_barrier(on_ranks):
    for rank, (out, told, added) in enumerate(on_ranks(3, _ring)):
        source = (rank - 1) % 3
        assert out == [100 * source + i for i in range(4)] + [100 * rank + i for i in range(4)]
        assert told == [7, 10 * rank + 3]
        assert added == 11


def _many_adds(member):
    arena = member.arena()
    with interpreting(arena.channel), heap.mapped(_heap_of(member, arena)):
        mine = _free(arena)
        for _ in range(500):
            heap.signal_op(mine, 1, 10, 0)
    member.meet("added")
    return ctypes.c_int64.from_address(mine).value


def test_signals_that_add_at_once_are_all_counted(on_ranks):
    assert on_ranks(3, _many_adds)[0] == 1500


@triton.jit
def _waiting_kernel(signal, out_ptr):
    tl.store(out_ptr, signal_wait_until(signal, CMP_GE, 3))


def _deadline(member):
    arena = member.arena()
    if member.rank == 1:
        member.meet("raised")
        return None
    out = torch.zeros(1, dtype=torch.int64)
    signal = int(arena.control.table[0]) + 8 * arrival_index(1, 1, 0, 1)
    epoch = arena.channel.begin(CallDescription("wait"), 0.3)
    began = time.monotonic()
    with interpreting(arena.channel), heap.mapped(_heap_free(arena)):
        _waiting_kernel[(1,)](signal, out)
    failure = arena.channel._kernel_failure
    member.meet("raised")
    assert isinstance(failure, PeerTimeoutError)
    return epoch, failure.peers, time.monotonic() - began < 5, out.item()


def _heap_free(arena):
    return heap.Heap(arena.rank, range(arena.world_size), arena.control, [arena.staging.buffer])


def test_a_wait_for_a_signal_ends_at_the_deadline_and_names_who_did_not_send_it(on_ranks):
    assert on_ranks(2, _deadline)[0] == (1, (1,), True, 0)


def _mistakes(member):
    arena = member.arena()
    mine = int(arena.staging.buffer.table[member.rank])
    found = []
    with interpreting(arena.channel), heap.mapped(_heap_free(arena)):
        for call in (
            lambda: put(mine - 8, mine, 8, 0),
            lambda: put(mine, mine, 8, 5),
            lambda: signal_wait_until(mine, 0, 1),
            barrier,
        ):
            with pytest.raises(RuntimeError) as caught:
                call()
            found.append(str(caught.value).replace(hex(mine), "M").replace(hex(mine - 8), "M-8"))
        near = heap.Heap(member.rank, [4, 9], arena.control, [arena.staging.buffer], near=frozenset())
        heap._heap = near
        reached = ptr(mine, 4), ptr(mine, 9)
    with pytest.raises(RuntimeError) as caught:
        quiet()
    return [*found, str(caught.value)], reached == (mine, 0)


def test_mistakes_are_told(on_ranks):
    found, reached = on_ranks(2, _mistakes)[0]
    assert found == [
        "M-8 is no symmetric address of rank 0",
        "put to PE 5, which is not among [0, 1]",
        "M is no arrival word; a wait for it would have nobody to blame",
        "this heap has no words for a barrier",
        "an interpreted kernel calls quiet outside of `mapped`",
    ]
    assert reached


def test_a_signal_comes_after_its_data(monkeypatch):
    order = []
    monkeypatch.setattr(heap.ctypes, "memmove", lambda *args: order.append("data"))
    monkeypatch.setattr(heap, "_store_word", lambda *args: order.append("signal"))
    monkeypatch.setattr(heap.Heap, "translate", lambda self, address, pe: address)
    with heap.mapped(heap.Heap(0, [0], None, [])):
        put_signal(1, 2, 3, 4, 5, 9, 0)
    assert order == ["data", "signal"]
