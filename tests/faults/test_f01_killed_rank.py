import dataclasses
import os
import signal
import time

import pytest
import torch

from tcomm.errors import PeerLostError
from tcomm.groups.fallback import TorchFallback
from tcomm.memory.channel import Channel
from tests.faults.worlds import failure_of, group, hang, reduce_ones, reduce_until_failure

VICTIM = 1
LIMIT_SECONDS = 2.0


@dataclasses.dataclass
class Killer:
    """Kills a rank once the ranks have shown that they are where they should be."""

    signals: object
    names: tuple[str, ...]
    pid: int = 0
    at: float = 0.0

    def __call__(self, processes):
        self.signals.wait_for(*self.names)
        time.sleep(0.05)
        self.pid = processes[VICTIM].pid
        self.at = time.monotonic()
        os.kill(self.pid, signal.SIGKILL)


def _until_killed(member, kind, signals):
    with group(member, kind.partition(":")[0]) as comm:
        first = reduce_until_failure(comm, kind, signals)
        # Whoever left now would free the others, who have to find out without.
        signals.show(f"failed-{member.rank}")
        signals.wait_for(*(f"failed-{rank}" for rank in range(member.world_size) if rank != VICTIM))
        again = failure_of(reduce_ones, comm, kind)
    return first, again


def _check_survivors(outcomes, killer):
    assert outcomes[VICTIM].exitcode == -signal.SIGKILL
    for rank in set(range(len(outcomes))) - {VICTIM}:
        assert not outcomes[rank].error, outcomes[rank].error
        first, again = outcomes[rank].value
        assert first.kind == "PeerLostError", first
        assert first.at - killer.at < LIMIT_SECONDS
        assert (first.op, first.rank, first.peers) == ("all_reduce", rank, (VICTIM,))
        assert first.seq > 0
        assert f"rank {VICTIM} died (pid {killer.pid}" in first.text, first.text
        assert again.kind == "PeerLostError", again
        assert again.peers == (VICTIM,)
        assert again.seconds < 0.5


@pytest.mark.parametrize(
    "kind", ["cpu", "triton:one_shot_push", "triton:one_shot_ll", "triton:two_shot", "torch"]
)
def test_f01_survivors_of_a_killed_rank_name_it(world, signals, kind):
    killer = Killer(signals, tuple(f"busy-{rank}" for rank in range(3)))
    outcomes = world(3, _until_killed, kind, signals, check=False, during=killer)
    _check_survivors(outcomes, killer)


def _call_until_killed(member, verb, args, algorithm, signals):
    with group(member, "torch" if algorithm == "torch" else "cpu") as comm:
        x, failures = torch.ones(6, 2), []
        for turn in range(100_000):
            if turn == 3:
                signals.show(f"busy-{member.rank}")
            try:
                getattr(comm, verb)(x, *args, algorithm=algorithm)
            except PeerLostError:
                failures.append(failure_of(getattr(comm, verb), x, *args, algorithm=algorithm))
                break
        signals.show(f"failed-{member.rank}")
        signals.wait_for(*(f"failed-{rank}" for rank in range(member.world_size) if rank != VICTIM))
        return failures


@pytest.mark.parametrize(
    ("verb", "args", "algorithm"),
    [
        ("all_gather_single", (), "cpu:pull"),
        ("all_gather_single", (), "triton:pull"),
        ("reduce_scatter_single", (), "cpu:push"),
        ("all_to_all_single", ([1, 2, 3],), "cpu:push"),
        ("all_gatherv", (), "torch"),
    ],
)
def test_f01_survivors_of_other_verbs_name_the_killed_rank(world, signals, verb, args, algorithm):
    killer = Killer(signals, tuple(f"busy-{rank}" for rank in range(3)))
    outcomes = world(3, _call_until_killed, verb, args, algorithm, signals, check=False, during=killer)
    for rank in (0, 2):
        assert not outcomes[rank].error, outcomes[rank].error
        (failure,) = outcomes[rank].value
        assert (failure.kind, failure.rank, failure.peers) == ("PeerLostError", rank, (VICTIM,))
        assert f"rank {VICTIM} died (pid {killer.pid}" in failure.text, failure.text
        assert failure.seconds < 0.5


def _hang_in_the_middle(member, phase, signals):
    if member.rank == VICTIM:
        publish = Channel.publish

        def stuck(channel, now, word):
            if channel.op == "all_reduce" and word >> 32 == 5 and now == phase:
                hang(signals, "stuck")
            publish(channel, now, word)

        Channel.publish = stuck
    return _until_killed(member, "cpu:two_shot", signals)


@pytest.mark.parametrize("phase", [0, 1])
def test_f01_a_rank_killed_before_a_phase_of_two_shot_is_named(world, signals, phase):
    killer = Killer(signals, ("stuck",))
    outcomes = world(3, _hang_in_the_middle, phase, signals, check=False, during=killer)
    _check_survivors(outcomes, killer)
    assert {outcomes[0].value[0].seq, outcomes[2].value[0].seq} == {5}


def _hang_in_torch(member, signals):
    if member.rank == VICTIM:
        run = TorchFallback.run

        def stuck(fallback, op, timeout, start, on_stream=False):
            if op == "all_reduce":
                hang(signals, "stuck")
            run(fallback, op, timeout, start, on_stream)

        TorchFallback.run = stuck
    return _until_killed(member, "torch", signals)


def test_f01_a_rank_killed_inside_torch_distributed_is_named(world, signals):
    killer = Killer(signals, ("stuck",))
    outcomes = world(4, _hang_in_torch, signals, check=False, during=killer)
    _check_survivors(outcomes, killer)
