import threading
import time

import pytest
import torch

from tcomm.errors import PeerLostError, PeerTimeoutError
from tcomm.memory import channel as channel_module
from tcomm.memory import wait as wait_module
from tcomm.memory.channel import Channel
from tcomm.memory.control import (
    CONTROL_BYTES,
    EPOCH_MASK,
    MAX_PHASES,
    ControlPage,
    PoisonCode,
    Word,
    arrival_index,
)
from tcomm.memory.wait import Wait
from tcomm.signature import CallDescription

CALL = CallDescription("barrier")


class _Process:
    """Stands for the watcher of a peer."""

    def __init__(self):
        self.dead = False

    def is_dead(self):
        return self.dead

    def describe(self):
        return "pid 7, running"


def pair(spins=5, world_size=2):
    """Both ends of a channel in one process, over private memory."""
    pages = [ControlPage(torch.zeros(CONTROL_BYTES, dtype=torch.uint8)) for _ in range(world_size)]
    return [
        Channel("tp", rank, pages, [None if r == rank else _Process() for r in range(world_size)], spins)
        for rank in range(world_size)
    ]


def _arrive(channel, epoch, call=CALL, phase=0):
    channel._descriptions.point(epoch & 1, call)
    channel.publish(phase, epoch << 32 | call.signature)


def test_agreeing_is_one_epoch_on_both_sides():
    a, b = pair()
    for expected in range(1, 6):
        thread = threading.Thread(target=b.agree, args=(CALL, 5.0))
        thread.start()
        assert a.agree(CALL, 5.0) == expected
        thread.join()
        assert a.words[Word.EPOCH] == b.words[Word.EPOCH] == expected


def test_an_arrival_of_another_phase_epoch_or_parity_is_not_enough():
    a, b = pair()
    epoch = a.begin(CALL, 0.15)
    for other, phase in [(epoch + 1, 0), (epoch + 2, 0), (epoch, 1)]:
        _arrive(b, other, phase=phase)
    with pytest.raises(PeerTimeoutError):
        a.await_peers(0, epoch << 32 | CALL.signature)


def test_every_peer_is_waited_for():
    a, b, c = pair(world_size=3)
    epoch = a.begin(CALL, 0.15)
    _arrive(b, epoch)
    with pytest.raises(PeerTimeoutError) as caught:
        a.await_peers(0, epoch << 32 | CALL.signature)
    assert caught.value.peers == (2,)
    assert c.words[Word.POISON_CODE] == PoisonCode.PEER_TIMEOUT


def test_a_timeout_says_who_what_and_how_long_and_is_for_good():
    a, b = pair()
    b.words[Word.EPOCH] = 41
    epoch = a.begin(CALL, 0.2)
    started = time.monotonic()
    with pytest.raises(PeerTimeoutError) as caught:
        a.await_peers(0, epoch << 32 | CALL.signature)
    assert 0.15 < time.monotonic() - started < 5
    error = caught.value
    assert (error.group, error.op, error.seq, error.rank, error.peers) == ("tp", "barrier", 1, 0, (1,))
    assert str(error) == (
        "barrier #1 of group 'tp' timed out after 0.2 s on rank 0: rank 1 is silent (pid 7, running; it has "
        "completed call #41); find out what it does, or call with a longer timeout="
    )
    for end, told in ((a, "rank 1 is silent"), (b, "the others gave up waiting for this rank, 1")):
        with pytest.raises(PeerTimeoutError, match=told):
            end.begin(CALL, 1.0)


def test_a_dead_peer_is_lost_at_once_unless_it_had_arrived():
    a, b = pair()
    epoch = a.begin(CALL, 60.0)
    a.processes[1].dead = True
    _arrive(b, epoch)
    a.await_peers(0, epoch << 32 | CALL.signature)
    a.finish(epoch)
    epoch = a.begin(CALL, 60.0)
    with pytest.raises(PeerLostError) as caught:
        a.await_peers(0, epoch << 32 | CALL.signature)
    assert str(caught.value).startswith("barrier #2 of group 'tp' cannot complete: rank 1 died (pid 7")


def test_a_peer_that_left_is_told_with_its_reason():
    a, b = pair()
    b.pages[1].leave("it closed the group")
    assert a.find_gone() == [1]
    epoch = a.begin(CALL, None)
    with pytest.raises(PeerLostError, match="rank 1 left: it closed the group"):
        a.await_peers(0, epoch << 32 | CALL.signature)


def test_without_a_timeout_a_wait_goes_on_until_the_peer_comes():
    a, b = pair()
    epoch = a.begin(CALL, None)
    assert a.deadline() is None
    threading.Timer(0.3, _arrive, (b, epoch)).start()
    a.await_peers(0, epoch << 32 | CALL.signature)


def test_the_clock_of_a_call_is_one_for_all_its_waits():
    a, _ = pair()
    a.begin(CALL, 0.5)
    first = a.deadline()
    time.sleep(0.05)
    assert a.deadline() == first
    a.begin(CALL, 0.5)
    assert a.deadline() > first


@pytest.mark.parametrize("epoch", [0, 1, 2**30 - 1, 2**31, EPOCH_MASK - 1, EPOCH_MASK])
def test_epochs_go_round(epoch):
    a, _ = pair()
    a.words[Word.EPOCH] = epoch
    following = a.begin(CALL, 1.0)
    assert following == (epoch + 1) % 2**32
    a.finish(following)
    assert a.words[Word.EPOCH] == following


def test_a_wait_tells_onlookers_whom_it_waits_for():
    a, b = pair()
    epoch = a.begin(CALL, 10.0)
    wait = Wait(a, 0, 0, epoch << 32 | CALL.signature)
    assert wait.step() is False
    assert (a.words[Word.WAITING_FOR], a.words[Word.SEQ]) == (2, epoch)
    _arrive(b, epoch)
    assert wait.step() is True


def test_a_short_disagreement_waits_for_the_others_before_it_is_told(monkeypatch):
    monkeypatch.setattr(wait_module, "_MISMATCH_GRACE_SECONDS", 0.1)
    a, b, _ = pair(world_size=3)
    epoch = a.begin(CALL, 10.0)
    _arrive(b, epoch, CallDescription("broadcast"))
    started = time.monotonic()
    with pytest.raises(channel_module.CollectiveMismatchError) as caught:
        a.await_peers(0, epoch << 32 | CALL.signature)
    assert time.monotonic() - started > 0.08
    assert str(caught.value).split("\n")[1:4] == [
        "  rank 0: barrier",
        "  rank 1: broadcast",
        "  rank 2: not arrived yet",
    ]
    assert a.words[Word.EPOCH] == epoch
    assert caught.value.peers == (1, 2)


def test_an_interruption_makes_the_others_raise():
    a, b = pair()
    a.begin(CALL, 1.0)
    a.interrupt()
    with pytest.raises(PeerLostError, match="rank 0 was interrupted in the middle of it"):
        b.begin(CALL, 1.0)


@pytest.mark.parametrize("end", ["time_out", "lose"])
def test_who_is_left_out_by_those_it_counts_on_raises_alone(end):
    a, b, c = pair(world_size=3)
    a.begin(CALL, 1.0)
    assert not a.is_left_out
    b.words[Word.LEFT_OUT] = 0b001
    assert (a.is_left_out, c.is_left_out) == (True, False)
    with pytest.raises(PeerTimeoutError, match="have gone on without this rank, 0, since call #1") as one:
        getattr(a, end)([2], 1)
    assert (one.value.seq, one.value.peers) == (1, (0,))
    epoch = a.begin(CALL, None)
    with pytest.raises(PeerTimeoutError, match="have gone on without this rank, 0"):
        a.await_peers(0, epoch << 32 | CALL.signature)
    a.words[Word.MASKED] -= 2
    a.interrupt()
    assert [end.words[Word.POISON_CODE] for end in (b, c)] == [0, 0]
    # Each goes on without the other: they differ, and both count.
    c.begin(CALL, 1.0)
    c.words[Word.LEFT_OUT], b.words[Word.LEFT_OUT] = 0b010, 0b100
    with pytest.raises((PeerLostError, PeerTimeoutError), match="rank 0 left"):
        getattr(c, end)([0], 1)
    assert b.words[Word.POISON_CODE] != 0


def test_lanes_count_as_absent_until_the_kernel_has_seen_them():
    a, b = pair()
    epoch = a.begin(CALL, 0.2)
    _arrive(b, epoch)
    word = epoch << 32 | CALL.signature
    assert a.kernel_pause(0, 0, word) == 0
    answers = []
    deadline = time.monotonic() + 5
    while not any(answers) and time.monotonic() < deadline:
        answers.append(a.kernel_pause(MAX_PHASES + 1, 0, word))
    assert answers[-1] == 1
    a.words[Word.ERROR_KIND] = 2
    with pytest.raises(PeerTimeoutError, match="rank 1 is silent"):
        a.after_kernel(epoch)
    assert a.words[Word.ERROR_KIND] == 0


def test_the_first_program_of_a_kernel_that_fails_says_why():
    a, _ = pair()
    word = a.begin(CALL, 0.05) << 32 | CALL.signature
    deadline = time.monotonic() + 5
    for block in (0, 1):
        while not a.kernel_pause(0, block, word):
            assert time.monotonic() < deadline
    a.words[Word.ERROR_KIND] = 2
    with pytest.raises(PeerTimeoutError, match=r"timed out after 0\.05 s"):
        a.after_kernel(word >> 32)


def test_words_are_published_in_the_pages_of_the_peers_only():
    a, b, c = pair(world_size=3)
    epoch = a.begin(CALL, 1.0)
    a.publish(1, epoch << 32 | 5)
    index = arrival_index(1, epoch & 1, 0, 0)
    assert [end.words[index] for end in (a, b, c)] == [0, epoch << 32 | 5, epoch << 32 | 5]
