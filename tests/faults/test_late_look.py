"""A rank sleeps between publishing and looking, while another catches the mismatch and goes on."""

import time

import pytest
import torch

from tcomm.memory.channel import Channel
from tests.faults.worlds import KINDS, failure_of, group, reduce_ones

SLEEPER = 1
SLEEP_SECONDS = 0.4
CALLS = ("all_reduce float32 [4] sum", "all_reduce float32 [5] sum", "all_reduce float32 [6] sum")


def _sleep_once(signals):
    """Between publishing and looking: until another has gone on to its next call, and then some."""
    if not signals.shown("published"):
        signals.show("published")
        signals.wait_for("gone on")
        time.sleep(SLEEP_SECONDS)


def _look_late(signals, state):
    await_peers, kernel_pause = Channel.await_peers, Channel.kernel_pause

    def late_await(channel, phase, word):
        if state["armed"]:
            _sleep_once(signals)
        await_peers(channel, phase, word)

    def late_pause(channel, phase, block, word):
        if state["armed"]:
            _sleep_once(signals)
        return kernel_pause(channel, phase, block, word)

    Channel.await_peers, Channel.kernel_pause = late_await, late_pause


def _mismatch_with_a_sleeper(member, kind, signals):
    state = {"armed": False}
    if member.rank == SLEEPER:
        _look_late(signals, state)
    algorithm = kind if ":" in kind else KINDS[kind]
    with group(member, kind.partition(":")[0]) as comm:
        reduce_ones(comm, kind)
        comm.barrier()
        state["armed"] = True
        if member.rank != SLEEPER:
            signals.wait_for("published")
        failure = failure_of(comm.all_reduce, torch.ones(4 + member.rank), algorithm=algorithm)
        if member.rank != SLEEPER:
            signals.show("gone on")
        caught = time.monotonic()
        for numel in (4, 7, 4):
            reduce_ones(comm, kind, numel=numel)
        return failure, time.monotonic() - caught


@pytest.mark.parametrize(
    ("kind", "world_size"),
    [
        ("cpu", 2),
        ("cpu", 3),
        ("cpu:two_shot", 3),
        ("triton", 2),
        ("triton", 3),
        ("triton:two_shot", 2),
        ("torch", 3),
    ],
)
def test_f06_a_rank_that_looks_late_still_sees_its_own_mismatch(world, signals, kind, world_size):
    results = world(world_size, _mismatch_with_a_sleeper, kind, signals)
    seqs = set()
    for rank, (failure, completed_after) in enumerate(results):
        assert failure.kind == "CollectiveMismatchError", failure
        for peer in range(world_size):
            assert f"  rank {peer}: {CALLS[peer]}" in failure.text, failure.text
        assert failure.peers == tuple(peer for peer in range(world_size) if peer != rank)
        seqs.add(failure.seq)
        if rank != SLEEPER:
            assert failure.seconds < SLEEP_SECONDS
            assert completed_after > SLEEP_SECONDS - 0.1
    assert len(seqs) == 1


def _mismatch_with_a_latecomer(member, kind, signals):
    algorithm = KINDS[kind]
    with group(member, kind) as comm:
        reduce_ones(comm, kind)
        comm.barrier()
        if member.rank == SLEEPER:
            signals.wait_for("caught-0", "caught-2")
            time.sleep(0.1)
        failure = failure_of(comm.all_reduce, torch.ones(4 + member.rank), algorithm=algorithm)
        signals.show(f"caught-{member.rank}")
        for numel in (4, 7, 4):
            reduce_ones(comm, kind, numel=numel)
        return failure


@pytest.mark.parametrize("kind", ["cpu", "triton"])
def test_f06_a_rank_that_comes_after_the_others_caught_the_mismatch_sees_it_too(world, signals, kind):
    results = world(3, _mismatch_with_a_latecomer, kind, signals)
    for rank in (0, 2):
        assert results[rank].kind == "CollectiveMismatchError", results[rank]
        assert "  rank 1: not arrived yet" in results[rank].text
        assert results[rank].seconds < 1.5
    assert results[1].kind == "CollectiveMismatchError", results[1]
    assert all(f"  rank {peer}: {CALLS[peer]}" in results[1].text for peer in range(3))
    assert len({failure.seq for failure in results}) == 1
