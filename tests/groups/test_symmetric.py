import contextlib
import gc
import logging
import os
import time

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import tcomm
from tcomm.errors import CapabilityError, CollectiveMismatchError, ConfigError, PeerLostError
from tcomm.groups import handle

NUMEL = 300_000
DIRECT = "cpu:two_shot_direct"


def _algorithm(comm):
    """What the last call did."""
    return comm._arena.channel._call.algorithm


def _ways(member):
    comm = member.communicator()
    ranks = range(comm.world_size)
    t = comm.symmetric_empty((600, 1000), torch.float32)
    assert (t.shape, t.dtype, t.is_contiguous(), t.requires_grad) == ((600, 1000), torch.float32, True, False)
    assert t.eq(0).all()
    x, total = torch.full((600, 1000), comm.rank + 1.0), float(sum(r + 1 for r in ranks))
    did = []
    got = comm.all_reduce(x, out=t)
    did.append((got is t, bool(t.eq(total).all()), bool(x.eq(comm.rank + 1).all()), _algorithm(comm)))
    t.copy_(x)
    got = comm.all_reduce(t, "max", out=t)
    did.append((got is t, bool(t.eq(comm.world_size).all()), True, _algorithm(comm)))
    # Part of it, from what is not contiguous, behind the caller's back, in inference mode.
    part = t[100:500]
    comm.all_reduce(torch.full((1000, 400), comm.rank + 1.0).t(), out=part)
    did.append((True, bool(part.eq(total).all()), bool(t[:100].eq(comm.world_size).all()), _algorithm(comm)))
    work = comm.all_reduce(x, "avg", out=t, async_op=True)
    did.append((work.wait() is t, bool(t.eq(total / comm.world_size).all()), True, _algorithm(comm)))
    with torch.inference_mode():
        comm.all_reduce(torch.full((600, 1000), comm.rank + 1.0), out=t)
    did.append((True, bool(t.eq(total).all()), not t.is_inference(), _algorithm(comm)))
    comm.close()
    # What a rank holds stays, also of a group that is closed.
    assert t.eq(total).all()
    return did


@pytest.mark.parametrize("world_size", [2, 3])
def test_results_go_straight_to_symmetric_tensors(on_ranks, world_size):
    assert on_ranks(world_size, _ways) == [[(True, True, True, DIRECT)] * 5] * world_size


def _others(member):
    comm = member.communicator()
    t, total = comm.symmetric_empty((NUMEL,)), float(sum(range(comm.world_size)))
    x = torch.full((NUMEL,), float(comm.rank))
    used = []
    # A strided result, a short message, another algorithm, another verb, another result.
    strided = comm.symmetric_empty((NUMEL, 2))[:, 0]
    assert comm.all_reduce(x, out=strided).eq(total).all()
    used.append(_algorithm(comm))
    assert comm.all_reduce(x[:10], out=t[:10]).eq(total).all()
    used.append(_algorithm(comm))
    assert comm.all_reduce(x, out=t, algorithm="cpu:two_shot").eq(total).all()
    used.append(_algorithm(comm))
    assert comm.all_reduce(t.fill_(comm.rank)).eq(total).all()
    used.append(_algorithm(comm))
    comm.broadcast(x, 1, out=t)
    used.append(_algorithm(comm))
    assert t.eq(1).all()
    # Only one rank wants a short result there: the others need not know.
    assert comm.all_reduce(x[:10], out=t[:10] if comm.rank else torch.empty(10)).eq(total).all()
    for empty in (comm.symmetric_empty((0, 3)), t[:0]):
        assert comm.all_reduce(torch.ones(empty.shape), out=empty) is empty
    assert comm.symmetric_empty((), torch.int64).eq(0)
    comm.close()
    return used


def test_everything_else_does_what_it_did(on_ranks):
    for used in on_ranks(3, _others):
        assert DIRECT not in used
        assert used[2] == "cpu:two_shot"


def _mistakes(member):
    comm = member.communicator()
    t, x = comm.symmetric_empty((2, NUMEL)), torch.ones(NUMEL)
    told = []
    calls = [
        lambda: comm.all_reduce(x, out=t[comm.rank % 2]),
        lambda: comm.all_reduce(x, out=t[0] if comm.rank else torch.empty(NUMEL)),
        lambda: comm.symmetric_empty((3, 1 + comm.rank // 2)),
        lambda: comm.symmetric_empty((3,), torch.int8 if comm.rank else torch.uint8),
    ]
    for call in calls:
        with pytest.raises(CollectiveMismatchError) as caught:
            call()
        told.append(str(caught.value).splitlines()[1:-1])
        assert comm.all_reduce(x, out=t[1]).eq(comm.world_size).all()
    for given in [(3, -1), (2.5,), None, 7, "ab", [[1]]]:
        with pytest.raises(ConfigError, match=r"^shape="):
            comm.symmetric_empty(given)
    for given in [(1 << 33, 1 << 33), (1 << 63,), (1 << 64,), (0, 1 << 62, 8), (1 << 32, 1 << 31, 3)]:
        with pytest.raises(ConfigError, match="is more than any memory"):
            comm.symmetric_empty(given)
    for dtype in ["float32", None, torch.qint8]:
        with pytest.raises(ConfigError, match="dtype of dense tensors"):
            comm.symmetric_empty((3,), dtype)
    with pytest.raises(CapabilityError, match="is no tensor of symmetric_empty"):
        comm.all_reduce(x, algorithm="two_shot_direct")
    with pytest.raises(CapabilityError, match=r"needed \d+ bytes"):
        comm.symmetric_empty((1 << 44,), torch.int64)
    assert comm.all_reduce(x, out=t[0]).eq(comm.world_size).all()
    comm.close()
    return told


def test_ranks_that_mean_different_places_are_told_and_go_on(on_ranks):
    told = on_ranks(3, _mistakes)
    assert told[0] == told[1] == told[2]
    of = f"all_reduce float32 [{NUMEL}] sum of symmetric tensor of call #1 from byte"
    assert told[0][0] == [
        f"  rank 0: {of} 0 on via {DIRECT}",
        f"  rank 1: {of} {4 * NUMEL} on via {DIRECT}",
        f"  rank 2: {of} 0 on via {DIRECT}",
    ]
    assert told[0][1][0].startswith(f"  rank 0: all_reduce float32 [{NUMEL}] sum via cpu:")
    assert told[0][2] == [f"  rank {r}: symmetric_empty float32 [3, {1 + r // 2}]" for r in range(3)]


def _bytes_as_numbers(member):
    """Buckets are bytes: any aligned part of them will do, whatever is behind it."""
    comm = member.communicator()
    t = comm.symmetric_empty((4 * NUMEL + 6,), torch.uint8)
    used = []
    for first, dtype in [(0, torch.float32), (0, torch.bfloat16), (4, torch.float32), (2, torch.float32)]:
        numel = 4 * NUMEL // dtype.itemsize
        array = t.numpy()[first : first + numel * dtype.itemsize]
        out = torch.frombuffer(array, dtype=dtype)
        assert comm.all_reduce(torch.ones(numel, dtype=dtype), out=out).eq(comm.world_size).all()
        used.append(_algorithm(comm))
    comm.close()
    return used


def test_any_aligned_part_of_a_symmetric_tensor_will_do(on_ranks):
    for used in on_ranks(2, _bytes_as_numbers):
        assert used[:3] == [DIRECT] * 3
        assert used[3] != DIRECT


def _of_one_rank(member):
    """What one rank's thread is about matters to none of them."""
    comm = member.communicator(timeout=10.0)
    t, x = comm.symmetric_empty((NUMEL,)), torch.ones(NUMEL)
    modes = [
        contextlib.nullcontext,
        lambda: FlopCounterMode(display=False),
        forward_ad.dual_level,
        lambda: torch.device("cpu"),
    ]
    for mode in modes:
        with mode() if comm.rank == 0 else contextlib.nullcontext():
            comm.all_reduce(x, out=t)
        assert (_algorithm(comm), bool(t.eq(comm.world_size).all())) == (DIRECT, True)
    comm.all_reduce(x, out=torch.nn.Parameter(t, requires_grad=False) if comm.rank else t)
    assert _algorithm(comm) == DIRECT
    comm.close()


def test_what_one_rank_does_besides_changes_no_choice(on_ranks):
    on_ranks(2, _of_one_rank)


def _forced(member):
    comm = member.communicator(timeout=10.0)
    t, x, other = comm.symmetric_empty((NUMEL,)), torch.ones(NUMEL), torch.empty(NUMEL)
    force = {"algorithm": "two_shot_direct"}
    calls = [
        (lambda: comm.all_reduce(x, out=other if comm.rank else t, **force), CollectiveMismatchError),
        (lambda: comm.all_reduce(x, out=other, **(force if comm.rank else {})), CollectiveMismatchError),
        (lambda: comm.all_reduce(x.byte(), out=t[: NUMEL // 4].view(torch.uint8), **force), CapabilityError),
        (lambda: comm.all_reduce(x, out=other, **force), CapabilityError),
    ]
    for call, kind in calls:
        started = time.monotonic()
        with pytest.raises(kind):
            call()
        assert time.monotonic() - started < 5
        assert comm.all_reduce(x, out=t).eq(comm.world_size).all()
    comm.close()


def test_ranks_of_which_one_cannot_do_what_is_forced_are_all_told(on_ranks):
    on_ranks(2, _forced)


def _named(member):
    comm = member.communicator()
    short = comm.explain("all_reduce", nbytes=1024, symmetric=True)
    long = comm.explain("all_reduce", nbytes=4 << 20, symmetric=True)
    plain = comm.explain("all_reduce", nbytes=4 << 20)
    text = str(long)
    comm.close()
    return short.algorithm, long.algorithm, text, [name for name, _ in plain.rejected]


def test_the_choice_says_why(on_ranks):
    short, long, text, rejected = on_ranks(2, _named)[0]
    assert short != DIRECT
    assert long == DIRECT
    assert text.splitlines()[0] == (
        f"all_reduce sum float32, {4 << 20} bytes on 2 ranks (cpu, into a symmetric tensor): {DIRECT}"
    )
    assert "because the table says so" in text.splitlines()[1]
    assert "us where cpu:two_shot_direct took" in text
    assert DIRECT not in rejected


def _unshared(member):
    member.process_group()
    logged = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logging.getLogger("tcomm").addHandler(handler)
    logging.getLogger("tcomm").setLevel(logging.INFO)
    handle.open_arena = lambda *_: tcomm.memory.base.NotShared("the ranks are on two moons")
    with tcomm.Communicator(name="tp") as comm:
        a, b = comm.symmetric_empty((3,)), comm.symmetric_empty((NUMEL,))
        assert comm.all_reduce(torch.ones(NUMEL), out=b).eq(2).all()
    assert a.tolist() == [0.0] * 3
    return [line for line in logged if "symmetric" in line]


def test_without_shared_memory_it_is_an_ordinary_tensor_and_that_is_said_once(on_ranks):
    told = "group 'tp': symmetric tensors are ordinary ones: the ranks are on two moons"
    assert on_ranks(2, _unshared) == [[told]] * 2


def test_a_world_of_one_has_ordinary_tensors():
    with tcomm.Communicator() as comm:
        t = comm.symmetric_empty((2, 3), torch.float64)
        assert comm.all_reduce(torch.ones(2, 3, dtype=torch.float64), out=t).eq(1).all()


def _lost(member):
    comm = member.communicator(timeout=10.0)
    t, x = comm.symmetric_empty((NUMEL,)), torch.ones(NUMEL)
    comm.all_reduce(x, out=t)
    member.meet("warm")
    if member.rank == 1:
        os._exit(0)
    started = time.monotonic()
    with pytest.raises(PeerLostError) as caught:
        comm.all_reduce(x, out=t)
    assert time.monotonic() - started < 5
    with pytest.raises(PeerLostError):
        comm.symmetric_empty((3,))
    return caught.value.peers, caught.value.op


def test_a_rank_that_is_gone_is_named(on_ranks):
    outcomes = on_ranks(3, _lost, check=False)
    for rank in (0, 2):
        assert not outcomes[rank].error, outcomes[rank].error
        assert outcomes[rank].value == ((1,), "all_reduce")


def _maps():
    with open("/proc/self/maps") as maps:
        return sum("tcomm-" in line for line in maps)


def _given_back(member):
    before = len(os.listdir("/proc/self/fd"))
    comm = member.communicator()
    comm.all_reduce(torch.ones(3))
    opened, mapped = len(os.listdir("/proc/self/fd")), _maps()
    tensors = [comm.symmetric_empty((NUMEL,)) for _ in range(5)]
    for t in tensors:
        comm.all_reduce(torch.ones(NUMEL), out=t)
    grown = _maps() - mapped
    assert len(os.listdir("/proc/self/fd")) == opened
    comm.close()
    del tensors, t
    closed = _maps() - mapped
    del comm
    gc.collect()
    return grown, closed, _maps(), len(os.listdir("/proc/self/fd")) - before


def test_memory_goes_when_the_group_is_closed_and_no_tensor_is_left(on_ranks):
    for grown, closed, left, fds in on_ranks(2, _given_back):
        assert grown == 5 * 2
        assert closed < 0
        assert left == 0
        assert fds <= 0


def _gradient(member):
    comm = member.communicator()
    t = comm.symmetric_empty((NUMEL,))
    weight = torch.ones(NUMEL, requires_grad=True)
    loss = (weight * t).sum()
    comm.all_reduce(torch.ones(NUMEL), out=t)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    # Also where this rank reduces nothing itself.
    short = t[:8]
    loss = (weight[:8] * short).sum()
    comm.all_reduce(torch.ones(8), out=short, algorithm="two_shot_direct")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(ConfigError):
        comm.all_reduce(torch.ones(NUMEL), out=t.clone().requires_grad_())
    comm.close()


def test_autograd_is_told(on_ranks):
    on_ranks(2, _gradient)


def _in_turn(member):
    """Known at a look or not, each result goes where it was told, by the algorithm of its place."""
    comm, numel, found = member.communicator(), 65536, []
    first, second = comm.symmetric_empty((numel,)), comm.symmetric_empty((numel,))
    places = [first, torch.empty(numel), second, torch.empty(numel)]
    sums = sum(range(1, member.world_size + 1))
    for place in places:
        place.fill_(-1.0)
    comm.barrier()
    for turn in range(1, 13):
        for out in places if turn % 3 else [place for place in places for _ in range(2)]:
            comm.all_reduce(torch.full((numel,), float(turn * (member.rank + 1))), out=out)
            found.append(bool(out.eq(turn * sums).all()))
            found += [bool(place.eq(-1.0).all()) for place in places if place is not out]
            out.fill_(-1.0)
    comm.close()
    return all(found)


def test_results_in_symmetric_memory_and_elsewhere_come_in_turn(on_ranks):
    assert on_ranks(2, _in_turn) == [True, True]
