import time

import pytest
import torch

from tcomm.errors import ConfigError, PeerTimeoutError
from tcomm.kernels import point_to_point
from tcomm.kernels.launch import launches
from tcomm.memory.control import HEADS, RECEIVED, SENT, TAILS, ErrorKind, Word
from tcomm.memory.mailbox import MailboxLayout
from tests.cpu import test_point_to_point as cpu
from tests.cpu.test_point_to_point import content, recv_by, same_bytes, send_by, small_arena

KERNELS = ("triton", "triton")
MIXED = [("cpu", "triton"), ("triton", "cpu")]
every_pair = pytest.mark.parametrize("engines", [KERNELS, *MIXED], ids="-".join)


def _example_of_the_docstrings(member):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MailboxLayout, "slot_bytes", 8)
        arena = small_arena(member)
        pages, mailboxes = arena.channel.pages, arena.mailboxes
        for number in range(3):
            if member.rank == 0:
                point_to_point.send(torch.tensor([number]), arena, 1)
            else:
                point_to_point.recv(torch.tensor([0]), arena, 0)
        member.meet("three")
        if member.rank == 0:
            point_to_point.send(torch.tensor([7, 8]), arena, 1)
        member.meet("sent")
        offsets = [mailboxes.layout.offset(0, slot) + 1024 for slot in (3, 0)]
        slots = [mailboxes.buffer.peer(1)[o : o + 8].numpy().view("int64").tolist() for o in offsets]
        before = pages[1].words[HEADS], pages[0].words[SENT + 1]
        out = [7, 8]
        if member.rank == 1:
            out = point_to_point.recv(torch.tensor([0, 0]), arena, 0).tolist()
        member.meet("received")
        after = pages[0].words[TAILS + 8], pages[1].words[RECEIVED]
        arena.close("done")
        return slots, before, out, after


def test_the_examples_of_the_docstrings(on_ranks):
    assert on_ranks(2, _example_of_the_docstrings) == [([[7], [8]], (5, 5), [7, 8], (5, 5))] * 2


@every_pair
def test_every_length_arrives_and_nothing_is_written_around_it(on_ranks, engines):
    on_ranks(2, cpu.ring_of_sizes, engines)


def test_every_length_arrives_in_a_ring_of_three(on_ranks):
    # Ranks 0 and 2 are neighbours and run one engine, the other pairs run both.
    on_ranks(3, cpu.ring_of_sizes, MIXED[1])


@every_pair
def test_every_dtype_and_shape_arrives_bit_by_bit(on_ranks, engines):
    on_ranks(2, cpu.every_dtype, engines)


@pytest.mark.parametrize(
    ("world_size", "engines"), [(2, KERNELS), (2, MIXED[0]), (3, MIXED[1]), (4, KERNELS)]
)
def test_all_pairs_send_both_ways_up_to_the_credits_in_order(on_ranks, world_size, engines):
    on_ranks(world_size, cpu.both_ways_up_to_the_credits, engines)


@every_pair
def test_another_dtype_or_shape_than_asked_for_is_told_and_the_message_stays(on_ranks, engines):
    cpu.check_mismatches(on_ranks(2, cpu.mismatch_keeps_the_message, engines))


@every_pair
def test_a_deadline_before_anything_moved_leaves_the_group_usable(on_ranks, engines):
    on_ranks(2, cpu.timeouts_before_anything_moved, engines)


@pytest.mark.parametrize("run", [cpu.send_times_out_in_the_middle, cpu.recv_times_out_in_the_middle])
def test_a_deadline_in_the_middle_of_a_message_gives_the_group_up(on_ranks, run):
    on_ranks(2, run, KERNELS)


@pytest.mark.parametrize("run", [cpu.sender_dies, cpu.receiver_dies, cpu.sender_dies_in_the_middle])
def test_a_dead_peer_is_told_and_what_it_sent_before_arrives(on_ranks, run):
    assert cpu.survivors_of(on_ranks(2, run, KERNELS, check=False)) == ["done"]


def test_a_peer_that_left_is_told_and_what_it_sent_before_arrives(on_ranks):
    on_ranks(2, cpu.a_peer_leaves, KERNELS)


def _budget_without_a_host(member, slots):
    """What a compiled kernel finds: no host raises while it waits, and the record says the rest."""
    arena = small_arena(member)
    x = content(1, (slots * arena.mailboxes.layout.slot_bytes,))
    move, told = (send_by if slots else recv_by), None
    if member.rank == 0:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(point_to_point, "_BUDGET", 3)
            with pytest.raises(PeerTimeoutError) as caught:
                move("triton", arena, 1, x)
        told = str(caught.value), arena.channel.words[Word.POISON_CODE] != 0
    member.meet("told")
    arena.close("done")
    return told


def test_a_kernel_that_runs_out_of_polls_says_whether_anything_moved(on_ranks):
    (told, is_given_up), _ = on_ranks(2, _budget_without_a_host, 0)
    assert "nothing of the message has moved" in told
    assert not is_given_up
    (told, is_given_up), _ = on_ranks(2, _budget_without_a_host, 5)
    assert "in the middle of a message" in told
    assert is_given_up


def _another_block_has_given_up(member):
    arena = small_arena(member)
    if member.rank == 0:
        arena.channel.words[Word.ERROR_KIND] = ErrorKind.TIMEOUT
        started = time.monotonic()
        with pytest.raises(PeerTimeoutError):
            recv_by("triton", arena, 1, content(1, (5,)), 20.0)
        assert time.monotonic() - started < 5.0
        assert arena.channel.words[Word.ERROR_KIND] == ErrorKind.NONE
    member.meet("told")
    arena.close("done")


def test_a_wait_ends_when_another_block_has_given_up(on_ranks):
    on_ranks(2, _another_block_has_given_up)


def _odd_places(member):
    arena = small_arena(member)
    base = torch.arange(100, dtype=torch.uint8)
    for first in (1, 8, 15):
        if member.rank == 0:
            send_by("triton", arena, 1, base[first : first + 40])
        else:
            out = torch.zeros(100, dtype=torch.uint8)
            recv_by("triton", arena, 0, out[first : first + 40])
            assert same_bytes(out[first : first + 40], base[first : first + 40])
            assert out[:first].eq(0).all()
            assert out[first + 40 :].eq(0).all()
    assert [point_to_point._bytes_of(base[first:]).data_ptr() % 16 for first in (0, 1, 8)] == [0, 0, 0]
    with pytest.raises(ConfigError, match="a kernel needs a contiguous tensor"):
        send_by("triton", arena, 1 - member.rank, base[::2])
    with pytest.raises(ConfigError, match="a kernel needs a contiguous tensor"):
        point_to_point.recv(base[::2], arena, 1 - member.rank)
    names = ("_send_kernel", "_recv_kernel")
    assert [launches[name] for name in names] == ([3, 0] if member.rank == 0 else [0, 3])
    arena.close("done")


def test_tensors_at_odd_addresses_go_by_a_copy(on_ranks):
    on_ranks(2, _odd_places)
