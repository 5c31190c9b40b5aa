"""The real kernels, interpreted by real processes, over device memory that a fake made."""

import itertools
import time

import pytest
import torch

from tcomm.errors import CapabilityError, GroupClosedError, GroupMismatchError
from tcomm.kernels import exchange, reduce_scatter
from tcomm.kernels.all_reduce import LAUNCHERS
from tcomm.kernels.barrier import arrival_barrier
from tcomm.memory.base import NotShared
from tcomm.memory.control import ARRIVALS, CONTROL_BYTES, MAGIC, MAILBOXES, HostWord, Word, dead_word
from tcomm.memory.device_arena import open_device_arena
from tcomm.parts import exchange_parts, gather_parts, scatter_parts
from tests.kernels.test_all_reduce import use_tiles
from tests.memory.fake_symm_mem import FakeSymmetricMemory, device_arena, on_device, transport_of
from tests.test_algorithms import mistake


def _words(arena, rank=None):
    return arena.control.peer(arena.rank if rank is None else rank, dtype=torch.int64)


def _bits(member):
    use_tiles(8192)
    with on_device(member) as arena:
        before = int(_words(arena)[Word.EPOCH])
        wanted = [("sum", torch.bfloat16), ("avg", torch.float32), ("max", torch.float16)]
        names = [f"triton:{name}" for name in LAUNCHERS]
        found = [
            mistake(member, arena, seed, name, op, dtype, (77,), special=True)
            for seed, (name, (op, dtype)) in enumerate(itertools.product(names, wanted))
        ]
        assert not any(found), "\n".join(filter(None, found))
        assert int(_words(arena)[Word.EPOCH]) - before == arena.channel.calls >= len(found)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_reduces_over_device_memory_have_the_bits_of_the_reference(on_ranks, world_size):
    on_ranks(world_size, _bits)


def _verbs(member):
    use_tiles(64)
    rank, world = member.rank, member.world_size
    with on_device(member) as arena:
        x = torch.arange(3.0 * world) + 100 * rank
        for name, launcher in exchange.LAUNCHERS.items():
            out = torch.zeros(3 * world)
            launcher(x, out, arena, exchange_parts([[3] * world] * world, rank))
            expected = torch.cat([torch.arange(3.0) + 3 * rank + 100 * r for r in range(world)])
            assert torch.equal(out, expected), (name, out)
            out = torch.zeros(2 * world)
            launcher(x[:2].contiguous(), out, arena, gather_parts([2] * world, rank))
            assert out.tolist() == [v + 100 * r for r in range(world) for v in (0.0, 1.0)]
        for name, launcher in reduce_scatter.LAUNCHERS.items():
            out = torch.zeros(3)
            launcher(x, out, arena, scatter_parts([3] * world, rank), "sum")
            whole = world * torch.arange(3.0 * world) + 100 * sum(range(world))
            assert torch.equal(out, whole[3 * rank : 3 * rank + 3]), (name, out)
        arrival_barrier(arena)


def test_exchanges_and_reduce_scatters_run_over_device_memory(on_ranks):
    on_ranks(3, _verbs)


def _layout(member):
    with on_device(member) as arena:
        words = _words(arena)
        assert int(words[Word.MAGIC]) == MAGIC
        assert [int(_words(arena, r)[Word.RANK]) for r in range(2)] == [0, 1]
        assert int(words[Word.HOST_RECORD]) == arena.channel.record.data_ptr()
        dead = dead_word(0) - (1 << 64)
        assert bool((words[ARRIVALS:MAILBOXES] == dead).all())
        staging = arena.staging
        lanes = staging.buffer.peer(member.rank, dtype=torch.int64)[: staging.layout.half_offset // 8]
        assert bool((lanes == dead).all())
        # One allocation: page, then staging.
        assert staging.buffer.local.data_ptr() == arena.control.local.data_ptr() + CONTROL_BYTES
        assert (arena.rank, arena.world_size, arena.is_virtual) == (member.rank, 2, False)
        assert [part.rank for part in arena.launch_parts] == [member.rank]
        assert staging.multicast == 0


def test_a_page_begins_with_its_header_and_words_of_nobody(on_ranks):
    on_ranks(2, _layout)


def _grow(member):
    use_tiles(512)
    with on_device(member, staging_bytes=1 << 16) as arena:
        x = torch.ones(40000) * (member.rank + 1)
        assert LAUNCHERS["one_shot_push"](x, arena)[-1] == 3
        many = arena.channel.calls
        old, page = arena.staging, arena.control.local.data_ptr()
        old.buffer.local[-1] = 77
        arena.grow(1 << 20, 20.0)
        assert LAUNCHERS["one_shot_push"](x, arena)[-1] == 3
        assert LAUNCHERS["one_shot_ll"](x[:100].contiguous(), arena)[-1] == 3
        assert many > 2
        assert arena.channel.calls == many + 2
        assert (int(old.buffer.local[-1]), old.layout.nbytes) == (77, 1 << 16)
        assert arena.control.local.data_ptr() == page
        assert int(_words(arena)[Word.EPOCH]) == arena.channel.calls
        member.meet("grown")
        assert [arena.epoch_of(rank) for rank in range(2)] == [arena.channel.calls] * 2
        arena.leave_out(0b10)
        assert int(_words(arena)[Word.LEFT_OUT]) == 0b10


def test_growing_makes_new_staging_and_leaves_the_old_and_the_epochs(on_ranks):
    on_ranks(2, _grow)


def _wrap(member, epoch):
    use_tiles(64)
    with on_device(member) as arena:
        arena.set_epoch(epoch)
        member.meet("set")
        for _ in range(5):
            for name in LAUNCHERS:
                assert LAUNCHERS[name](torch.ones(100), arena).tolist() == [2.0] * 100
        arena.grow(1 << 17, 20.0)
        assert LAUNCHERS["one_shot_ll"](torch.ones(9), arena).tolist() == [2.0] * 9
        assert int(_words(arena)[Word.EPOCH]) == (epoch + arena.channel.calls) & 0xFFFFFFFF


@pytest.mark.parametrize("epoch", [(1 << 32) - 4, (1 << 31) - 12, (1 << 30) - 4])
def test_epochs_pass_the_wrap_and_growing_keeps_lanes_nobodys(on_ranks, epoch):
    on_ranks(2, _wrap, epoch)


def _grows_half_a_wrap_away(member):
    """What is nobody's at epoch 0 is somebody's half a wrap later, so new lanes follow the epoch."""
    use_tiles(64)
    with on_device(member) as arena:
        arena.set_epoch((1 << 31) - 2)
        member.meet("set")
        staging = arena.grow(1 << 17, 20.0)
        lanes = staging.buffer.peer(member.rank, dtype=torch.int64)[: staging.layout.half_offset // 8]
        assert bool((lanes == dead_word((1 << 31) - 2)).all())
        member.meet("looked")
        for call in range(3):
            x = torch.ones(50) * (member.rank + 1 + call)
            assert LAUNCHERS["one_shot_ll"](x, arena).tolist() == [3.0 + 2 * call] * 50


def test_new_lanes_are_nobodys_at_the_epoch_at_which_they_are_made(on_ranks):
    on_ranks(2, _grows_half_a_wrap_away)


def _closed(member):
    host = member.arena(name="host")
    memory = FakeSymmetricMemory(member.exchange("memory"))
    arena = device_arena(member, memory, host.channel)
    from tcomm.memory import cuda

    assert len(cuda._never_collected) >= 3
    arena.close("it is the test")
    arena.close("again")
    assert not cuda._never_collected
    assert memory.settled > 0
    for use in (
        lambda: LAUNCHERS["two_shot"](torch.ones(3), arena),
        lambda: arena.grow(1 << 20, 1.0),
        lambda: arena.channel.begin(None, 1.0),
    ):
        with pytest.raises(GroupClosedError):
            use()
    host.close("done")


def test_closing_twice_gives_back_once_and_what_follows_is_refused(on_ranks):
    on_ranks(2, _closed)


def _broken_device(member):
    from tcomm.memory import cuda

    host = member.arena(name="host")
    memory = FakeSymmetricMemory(member.exchange("memory"))
    arena = device_arena(member, memory, host.channel)
    assert id(arena.channel.record) in cuda._never_collected

    def settle():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    memory.settle = settle
    arena.close()
    arena.close()
    with pytest.raises(GroupClosedError):
        arena.channel.begin(None, 1.0)
    host.close("done")
    return len(cuda._never_collected)


def test_a_broken_device_can_be_left_and_its_handles_are_not_destroyed(on_ranks):
    assert all(kept > 2 for kept in on_ranks(2, _broken_device))


def _slow_last_call(member):
    """What was launched without a deadline, and never ends, is aborted by the one who leaves."""
    from tcomm.memory import device_arena as module

    module._LAST_CALLS_SECONDS = 0.2
    memory = FakeSymmetricMemory(member.exchange("memory"))
    arena = device_arena(member, memory)

    def settle():
        while not arena.channel.record[HostWord.ABORT]:
            time.sleep(0.01)

    memory.settle = settle
    arena.close()


def test_closing_is_bounded(on_ranks):
    on_ranks(1, _slow_last_call, timeout=20.0)


def _no_room(member):
    options = {"too_large": 1 << 19} if member.rank == 1 else {}
    memory = FakeSymmetricMemory(member.exchange("memory"), **options)
    with pytest.raises(CapabilityError) as caught:
        device_arena(member, memory)
    assert memory.entered == 0
    small = device_arena(member, memory, staging_bytes=1 << 17, name="small")
    old = small.staging
    with pytest.raises(CapabilityError) as again:
        small.grow(1 << 20, 20.0)
    assert small.staging is old
    assert LAUNCHERS["two_shot"](torch.ones(5), small).tolist() == [2.0] * 5
    small.close()
    return str(caught.value), str(again.value)


def test_one_rank_without_room_is_everyones_error_and_nobody_enters_the_rendezvous(on_ranks):
    told = on_ranks(2, _no_room)
    assert told[0] == told[1]
    nbytes = (1 << 20) + CONTROL_BYTES
    assert told[0][0] == (
        f"no GPU memory of {nbytes} bytes a rank (rank 1: CUDA driver error: out of memory: needed {nbytes} "
        "bytes, available 524288); free some, or lower TCOMM_STAGING_BYTES"
    )


def _not_shared(member, options, allow, opened_by, timeout=2.0):
    options = options if member.rank == opened_by else {}
    memory = FakeSymmetricMemory(member.exchange("memory"), **options)
    transport = transport_of(member, memory, allow)
    exchange_ = member.exchange("arena")
    made = open_device_arena("g", exchange_, transport, torch.device("cpu"), None, 1 << 17, timeout)
    return (made.reason if isinstance(made, NotShared) else "", memory.entered)


@pytest.mark.parametrize(
    ("options", "reason", "entered"),
    [
        ({"reason": "this torch is built without CUDA"}, "rank 1: this torch is built without CUDA", 0),
        (
            {"device": "device 0"},
            "ranks [0, 1] use one device: give each its own, or set TCOMM_ALLOW_SHARED_DEVICE=1",
            0,
        ),
    ],
)
def test_what_one_rank_lacks_is_everyones_reason_before_the_rendezvous(on_ranks, options, reason, entered):
    told = on_ranks(2, _not_shared, options, False, 1)
    assert told == [(f"the GPUs share no memory ({reason})", entered)] * 2


def _alone_in_the_rendezvous(member):
    return _not_shared(member, {"broken": "cuMemMap failed"}, False, 1)


def test_a_rendezvous_that_fails_or_hangs_is_everyones_reason_within_the_deadline(on_ranks):
    told = on_ranks(2, _alone_in_the_rendezvous)
    assert told[0] == told[1]
    assert "rank 1: cuMemMap failed" in told[0][0]
    told = on_ranks(2, _not_shared, {"stuck": 1.2}, False, 0, 0.6, timeout=20.0)
    assert told[0][0] == told[1][0]
    assert "rank 0: torch's rendezvous did not end within 0.6 s" in told[0][0]


def _shared_device(member, environ):
    import os

    os.environ.pop("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", None)
    made = _not_shared(member, {"device": "device 0"}, True, 1)
    return made, os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES")


def test_ranks_share_a_device_when_asked_to_and_torch_is_told(on_ranks):
    assert on_ranks(2, _shared_device, None) == [(("", 1), "1")] * 2


def _sizes_differ(member):
    transport = transport_of(member)
    with pytest.raises(GroupMismatchError) as caught:
        transport.allocate(4096 * (member.rank + 1), 5.0)
    return str(caught.value)


def test_different_sizes_are_refused_on_every_rank(on_ranks):
    told = "the ranks want buffers of different sizes (rank 0: 4096, rank 1: 8192 bytes)"
    assert on_ranks(2, _sizes_differ) == [told] * 2


def _parts(member):
    memory = FakeSymmetricMemory(member.exchange("memory"), multicast=1 << 40)
    host = member.arena(name="host")
    arena = device_arena(member, memory, host.channel)
    assert arena.multicast == 1 << 40
    assert arena.staging.multicast == (1 << 40) + CONTROL_BYTES
    assert arena.control.multicast == 1 << 40
    member.meet("looked")
    arena.close()
    host.close("done")


def test_staging_has_its_own_part_of_the_multicast_address(on_ranks):
    on_ranks(2, _parts)


def test_the_record_words_do_not_overlap():
    assert len({HostWord.ERROR, HostWord.EXPECTED, HostWord.SEEN, HostWord.ABORT}) == 4
