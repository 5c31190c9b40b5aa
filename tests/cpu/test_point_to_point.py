"""Send and recv by the CPU path; `tests/kernels/test_point_to_point.py` runs the same on kernels."""

import itertools
import os
import time

import pytest
import torch

from tcomm.cpu.point_to_point import make_recv, make_send
from tcomm.errors import CollectiveMismatchError, PeerLostError, PeerTimeoutError
from tcomm.memory.control import HEADS, Word
from tcomm.memory.mailbox import Message

CPU = (("cpu", "cpu"),)
DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.float8_e4m3fn,
    torch.bfloat16,
    torch.int64,
    torch.float64,
    torch.complex64,
    torch.complex128,
)


def send_by(engine, arena, dst, x, timeout=20.0):
    if engine == "cpu":
        return make_send(arena.mailboxes, dst, _message_of(x))(x, timeout)
    from tcomm.kernels.point_to_point import send

    return send(x, arena, dst, timeout=timeout)


def recv_by(engine, arena, src, out, timeout=20.0):
    if engine == "cpu":
        make_recv(arena.mailboxes, src, _message_of(out))(out, timeout)
    else:
        from tcomm.kernels.point_to_point import recv

        assert recv(out, arena, src, timeout=timeout) is out
    return out


def _message_of(x):
    return Message(str(x.dtype).removeprefix("torch."), x.shape, x.numel() * x.itemsize)


def engine_of(engines, rank):
    """Even ranks run the first, odd ranks the second."""
    return engines[rank % 2]


def small_arena(member):
    return member.arena(staging_bytes=64 * 1024)


def content(seed, shape, dtype=torch.uint8):
    """Bytes that differ from place to place and from seed to seed."""
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    data = (torch.arange(nbytes) * 7 + seed * 31 + torch.arange(nbytes) // 251).to(torch.uint8)
    if dtype == torch.bool:
        data = data % 2
    return data.view(dtype).view(shape) if nbytes else torch.empty(shape, dtype=dtype)


def same_bytes(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and bytes_of(a) == bytes_of(b)


def bytes_of(x):
    return bytes(x.reshape(-1).view(torch.uint8).numpy())


def lengths_of(arena):
    slot = arena.mailboxes.layout.slot_bytes
    return [0, 1, 7, 8, 15, 4099, slot - 1, slot, slot + 1, 4 * slot, 4 * slot + 1, 9 * slot + 5]


def ring_of_sizes(member, engines):
    """Every rank sends each length to the next one and receives it from the last, between guard bands."""
    arena, engine = small_arena(member), engine_of(engines, member.rank)
    following, previous = (member.rank + 1) % member.world_size, (member.rank - 1) % member.world_size
    for seed, nbytes in enumerate(lengths_of(arena)):
        guarded = torch.full((nbytes + 202,), 77, dtype=torch.uint8)
        out = guarded[101 : 101 + nbytes]
        # Rank 0 receives first, so that the ring does not wait for itself.
        if member.rank > 0:
            send_by(engine, arena, following, content(seed, (nbytes,)))
        recv_by(engine, arena, previous, out)
        if member.rank == 0:
            send_by(engine, arena, following, content(seed, (nbytes,)))
        assert same_bytes(out, content(seed, (nbytes,))), nbytes
        assert guarded[:101].eq(77).all(), nbytes
        assert guarded[101 + nbytes :].eq(77).all(), nbytes
    arena.close("done")


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_length_arrives_and_nothing_is_written_around_it(on_ranks, world_size):
    on_ranks(world_size, ring_of_sizes, CPU[0])


def every_dtype(member, engines):
    arena, engine = small_arena(member), engine_of(engines, member.rank)
    for seed, (dtype, shape) in enumerate(itertools.product(DTYPES, [(), (33,), (3, 0, 5), (5, 7)])):
        x = content(seed, shape, dtype)
        if member.rank == 0:
            send_by(engine, arena, 1, x)
        else:
            assert same_bytes(recv_by(engine, arena, 0, torch.zeros(shape, dtype=dtype)), x), (dtype, shape)
    arena.close("done")


def test_every_dtype_and_shape_arrives_bit_by_bit(on_ranks):
    on_ranks(2, every_dtype, CPU[0])


def both_ways_up_to_the_credits(member, engines):
    """Four messages from each rank to each other before anybody receives, again and again."""
    arena, engine = small_arena(member), engine_of(engines, member.rank)
    slot = arena.mailboxes.layout.slot_bytes
    peers = [peer for peer in range(member.world_size) if peer != member.rank]
    for turn in range(4):
        lengths = [1, slot, 0, 300]
        for number, peer in itertools.product(range(4), peers):
            x = content(turn + 10 * number + 100 * member.rank, (lengths[number],))
            send_by(engine, arena, peer, x, 5.0)
        for number, peer in itertools.product(range(4), peers):
            out = recv_by(engine, arena, peer, torch.zeros(lengths[number], dtype=torch.uint8), 5.0)
            assert same_bytes(out, content(turn + 10 * number + 100 * peer, (lengths[number],)))
    arena.close("done")


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_all_pairs_send_both_ways_up_to_the_credits_in_order(on_ranks, world_size):
    on_ranks(world_size, both_ways_up_to_the_credits, CPU[0])


def mismatch_keeps_the_message(member, engines):
    arena, engine = small_arena(member), engine_of(engines, member.rank)
    long = 6 * arena.mailboxes.layout.slot_bytes
    told = []
    for numel in (6, long):
        if member.rank == 0:
            send_by(engine, arena, 1, content(numel, (numel,)))
            send_by(engine, arena, 1, content(1, (2,)))
            continue
        wrong = [
            torch.zeros(numel, dtype=torch.int8),
            torch.zeros(2, numel // 2, dtype=torch.uint8),
            torch.zeros(numel + 1, dtype=torch.uint8),
        ]
        for out in wrong:
            with pytest.raises(CollectiveMismatchError) as caught:
                recv_by(engine, arena, 0, out)
            assert out.eq(0).all()
            assert (caught.value.op, caught.value.rank, caught.value.peers) == ("recv", 1, (0,))
            told.append(str(caught.value))
        out = torch.zeros(numel, dtype=torch.uint8)
        assert same_bytes(recv_by(engine, arena, 0, out), content(numel, (numel,)))
        assert same_bytes(recv_by(engine, arena, 0, torch.zeros(2, dtype=torch.uint8)), content(1, (2,)))
    arena.close("done")
    return told


def check_mismatches(results):
    _, told = results
    assert len(told) == 6
    assert told[0] == (
        "recv from rank 0 of group 'arena': the next message is another than was asked for\n"
        "  rank 0 sent: uint8 [6] (6 bytes)\n"
        "  rank 1 asked for: int8 [6] (6 bytes)\n"
        "the message stays; receive it into a tensor like it; the group stays usable"
    )


def test_another_dtype_or_shape_than_asked_for_is_told_and_the_message_stays(on_ranks):
    check_mismatches(on_ranks(2, mismatch_keeps_the_message, CPU[0]))


def timeouts_before_anything_moved(member, engines):
    arena, engine = small_arena(member), engine_of(engines, member.rank)
    x = content(3, (10,))
    peer = 1 - member.rank
    if member.rank == 1:
        started = time.monotonic()
        with pytest.raises(PeerTimeoutError) as caught:
            recv_by(engine, arena, 0, torch.zeros_like(x), 0.3)
        assert 0.25 < time.monotonic() - started < 3.0
        assert (caught.value.op, caught.value.peers) == ("recv", (0,))
        assert "recv from rank 0 of group 'arena' timed out after 0.3 s on rank 1" in str(caught.value)
        assert "nothing of the message has moved, so the group stays usable" in str(caught.value)
    member.meet("late")
    if member.rank == 0:
        for _ in range(4):
            send_by(engine, arena, peer, x)
        with pytest.raises(PeerTimeoutError) as caught:
            send_by(engine, arena, peer, content(9, (10,)), 0.3)
        assert (caught.value.op, caught.value.peers) == ("send", (1,))
        assert "send to rank 1 of group 'arena' timed out after 0.3 s on rank 0" in str(caught.value)
    member.meet("full")
    if member.rank == 0:
        send_by(engine, arena, peer, content(4, (10,)))
    else:
        for seed in (3, 3, 3, 3, 4):
            assert same_bytes(recv_by(engine, arena, peer, torch.zeros_like(x)), content(seed, (10,)))
    assert arena.channel.words[Word.POISON_CODE] == 0
    assert arena.channel.words[Word.WAITING_FOR] == 0
    arena.close("done")


def test_a_deadline_before_anything_moved_leaves_the_group_usable(on_ranks):
    on_ranks(2, timeouts_before_anything_moved, CPU[0])


def send_times_out_in_the_middle(member, engines):
    arena, engine = small_arena(member), engine_of(engines, member.rank)
    x = content(3, (6 * arena.mailboxes.layout.slot_bytes,))
    if member.rank == 0:
        with pytest.raises(PeerTimeoutError, match="in the middle of a message") as caught:
            send_by(engine, arena, 1, x, 0.3)
        assert caught.value.peers == (1,)
    member.meet("given up")
    if member.rank == 1:
        with pytest.raises(PeerTimeoutError, match="was given up"):
            recv_by(engine, arena, 0, torch.zeros_like(x))
    arena.close("done")


def recv_times_out_in_the_middle(member, engines):
    arena, engine = small_arena(member), engine_of(engines, member.rank)
    x = content(3, (2 * arena.mailboxes.layout.slot_bytes,))
    if member.rank == 0:
        send_by(engine, arena, 1, x)
        # As it looks from there when only the first slot of two has been sent.
        arena.channel.pages[1].words[HEADS] = 1
    member.meet("half")
    if member.rank == 1:
        with pytest.raises(PeerTimeoutError, match="in the middle of a message") as caught:
            recv_by(engine, arena, 0, torch.zeros_like(x), 0.3)
        assert caught.value.peers == (0,)
    member.meet("given up")
    with pytest.raises(PeerTimeoutError, match="was given up"):
        send_by(engine, arena, 1 - member.rank, x)
    arena.close("done")


@pytest.mark.parametrize("run", [send_times_out_in_the_middle, recv_times_out_in_the_middle])
def test_a_deadline_in_the_middle_of_a_message_gives_the_group_up(on_ranks, run):
    on_ranks(2, run, CPU[0])


def sender_dies(member, engines):
    arena, engine = small_arena(member), engine_of(engines, member.rank)
    x = content(3, (3 * arena.mailboxes.layout.slot_bytes,))
    if member.rank == 0:
        send_by(engine, arena, 1, x)
        os._exit(0)
    while not arena.channel.is_gone(0):
        time.sleep(0.01)
    assert same_bytes(recv_by(engine, arena, 0, torch.zeros_like(x)), x)
    started = time.monotonic()
    with pytest.raises(PeerLostError) as caught:
        recv_by(engine, arena, 0, x)
    assert time.monotonic() - started < 3.0
    assert caught.value.peers == (0,)
    assert "recv from rank 0 of group 'arena' cannot complete: rank 0 died" in str(caught.value)
    arena.close("done")
    return "done"


def receiver_dies(member, engines):
    arena, engine = small_arena(member), engine_of(engines, member.rank)
    x = content(3, (10,))
    if member.rank == 0:
        os._exit(0)
    while not arena.channel.is_gone(0):
        time.sleep(0.01)
    started = time.monotonic()
    for _ in range(4):
        send_by(engine, arena, 0, x)
    with pytest.raises(PeerLostError) as caught:
        send_by(engine, arena, 0, x)
    assert time.monotonic() - started < 3.0
    assert caught.value.peers == (0,)
    assert "send to rank 0 of group 'arena' cannot complete: rank 0 died" in str(caught.value)
    arena.close("done")
    return "done"


def sender_dies_in_the_middle(member, engines):
    arena, engine = small_arena(member), engine_of(engines, member.rank)
    x = content(3, (2 * arena.mailboxes.layout.slot_bytes,))
    if member.rank == 0:
        send_by(engine, arena, 1, x)
        # As it looks when it dies between the two slots.
        arena.channel.pages[1].words[HEADS] = 1
        os._exit(0)
    while not arena.channel.is_gone(0):
        time.sleep(0.01)
    with pytest.raises(PeerLostError, match="rank 0 died"):
        recv_by(engine, arena, 0, torch.zeros_like(x))
    arena.close("done")
    return "done"


def survivors_of(outcomes):
    return [outcome.error or outcome.value for outcome in outcomes if outcome.rank > 0]


@pytest.mark.parametrize("run", [sender_dies, receiver_dies, sender_dies_in_the_middle])
def test_a_dead_peer_is_told_and_what_it_sent_before_arrives(on_ranks, run):
    assert survivors_of(on_ranks(2, run, CPU[0], check=False)) == ["done"]


def a_peer_leaves(member, engines):
    arena, engine = small_arena(member), engine_of(engines, member.rank)
    x = content(3, (10,))
    if member.rank == 0:
        send_by(engine, arena, 1, x)
        arena.close("it had enough")
        return
    while not arena.channel.is_gone(0):
        time.sleep(0.01)
    assert same_bytes(recv_by(engine, arena, 0, torch.zeros_like(x)), x)
    with pytest.raises(PeerLostError, match="rank 0 left: it had enough") as caught:
        send_by(engine, arena, 0, x)
    assert caught.value.op == "send"
    with pytest.raises(PeerLostError) as caught:
        recv_by(engine, arena, 0, x)
    assert caught.value.op == "recv"
    arena.close("done")


def test_a_peer_that_left_is_told_and_what_it_sent_before_arrives(on_ranks):
    on_ranks(2, a_peer_leaves, CPU[0])


def sent_while_the_receiver_gives_up(member, engines, look):
    """The message comes right when the receiver finds its sender dead, or its deadline passed."""
    arena, engine = small_arena(member), engine_of(engines, member.rank)
    x = content(3, (10,))

    def give_up(*_):
        member.meet("looking")
        member.meet("sent")
        return True

    if member.rank == 0:
        member.meet("looking")
        send_by(engine, arena, 1, x)
        member.meet("sent")
    else:
        wait = arena.mailboxes.wait_of("recv", 0)
        setattr(arena.channel if look == "is_gone" else wait, look, give_up)
        assert same_bytes(recv_by(engine, arena, 0, torch.zeros_like(x)), x)
    assert arena.channel.words[Word.POISON_CODE] == 0
    arena.close("done")


@pytest.mark.parametrize("look", ["is_gone", "_is_late"])
def test_a_message_that_comes_at_the_last_moment_counts(on_ranks, look):
    on_ranks(2, sent_while_the_receiver_gives_up, CPU[0], look)
