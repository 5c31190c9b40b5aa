import os
import signal
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tcomm.eplb.migration import migration
from tcomm.eplb.moving.creation import create_eplb_communicator
from tcomm.eplb.moving.meeting import Meeting
from tcomm.eplb.moving.messages import MessageMover
from tcomm.eplb.moving.rearrange import rearrange_expert_weights_inplace
from tcomm.errors import PeerTimeoutError
from tcomm.groups.setup import from_process_group
from tests.eplb.moving.failures import LAYER, SECONDS, die, move, stop
from tests.eplb.moving.weights import KINDS, ROW_NBYTES, Layers, random_maps
from tests.groups.all2all.worlds import told


def _mover(weights, seconds=20.0):
    communicator = create_eplb_communicator(dist.group.WORLD, None, weights, timeout=seconds)
    members = from_process_group(dist.group.WORLD, "experts")
    return MessageMover(members, weights, communicator, seconds)


class Counting:
    """Around a communicator: how many rows each `execute` sends and receives."""

    def __init__(self, inner):
        self.inner = inner
        self.rounds = []
        self.needs_profile_buffer_reservation = True
        self._now = [0, 0]

    def set_transfer_context(self, old_indices, layer_idx):
        self.layer = layer_idx

    def add_send(self, tensors, dst_rank, expert_id):
        self._now[0] += 1
        self.inner.add_send(tensors, dst_rank, expert_id)

    def add_recv(self, tensors, src_rank, expert_id):
        self._now[1] += 1
        self.inner.add_recv(tensors, src_rank, expert_id)

    def execute(self):
        self.rounds.append(tuple(self._now))
        self._now = [0, 0]
        self.inner.execute()


def _random(member, cases, size):
    member.process_group()
    generator = np.random.default_rng(member.world_size)
    wrong, rounds, needed, mover = [], [], [], None
    for case in range(cases):
        old, new = random_maps(generator, 3, member.world_size, size)
        layers = Layers.filled(old, member.rank, size)
        if mover is None:
            mover = _mover(layers.weights[0])
            counting = mover._communicator = Counting(mover._communicator)
            mover.reserve(layers.weights[0])
            rounds.append(counting.rounds[:])
        counting.rounds.clear()
        with torch.inference_mode(case % 2 == 1):
            rearrange_expert_weights_inplace(old, new, layers.weights, dist.group.WORLD, mover=mover)
        moves = migration(old, new, member.world_size).layers
        copies = [copy for each in moves for round_ in each.rounds for copy in round_]
        mine = sum(copy.target // size == member.rank for copy in copies)
        rounds.append((len(counting.rounds), max(map(max, counting.rounds), default=0) <= 1))
        needed.append((sum(len(each.rounds) for each in moves), True))
        assert sum(received for _, received in counting.rounds) == mine
        wrong += [layers.wrong(layer, old[layer], new[layer]) for layer in range(3)]
    refused = [
        told(mover.prepare, 0, moves[1], layers.weights[0][:-1]),
        told(mover.reserve, layers.weights[0][:-1]),
        told(mover.commit, 0, moves[1], layers.weights[0]),
        # They have other weights for the same place, and are told so at once; the mover stays usable.
        told(mover.prepare, member.rank, moves[1], layers.weights[0]),
        told(mover.reserve, layers.weights[0]),
    ]
    refused.append(told(mover.settle, True))
    mover.prepare(0, moves[1], layers.weights[0])
    assert mover.settle(True) is mover.settle(False) is True
    mover.close()
    refused.append(told(mover.prepare, 0, moves[1], layers.weights[0]))
    return wrong, rounds, needed, mover.buffer.numel(), [text for _, text in refused]


def test_random_maps_move_byte_exactly_in_rounds(on_ranks):
    for world, cases in ((2, 4), (3, 4)):
        for wrong, rounds, needed, nbytes, refused in on_ranks(world, _random, cases, 4):
            assert wrong == [[]] * (3 * cases)
            assert rounds == [[(1, 1)], *needed]
            expected = [
                "and those of the first layer",
                "and those of the first layer",
                "layer 0, which was not prepared",
                "the ranks are to move different things\n  rank 0: move_experts",
                "",
                "settle without a layer",
                "over since it was closed",
            ]
            assert [part in text for part, text in zip(expected, refused, strict=True)] == [True] * 7
            assert 4 * ROW_NBYTES <= nbytes <= 4 * ROW_NBYTES + 16 * len(KINDS)


def _race(member, point):
    """Rank 0 gives up waiting for the last rank, when all has come; before the others agree, or after."""
    gather, commit = Meeting.gather, Meeting.commit

    def impatient(self, step, payload, deadline):
        got = gather(self, step, payload, deadline)
        if member.rank == 0 and step == "after" and self._number == LAYER:
            time.sleep(0.0 if "first" in point else 0.3)
            raise self._error(PeerTimeoutError, "late", [member.world_size - 1])
        return got

    def slow(self):
        if member.rank and "first" in point and self._number == LAYER:
            time.sleep(1.0)
        commit(self)

    Meeting.gather, Meeting.commit = impatient, slow


def _failing(member, point):
    """The last rank dies or stops in layer 1."""
    member.process_group()
    is_victim = member.rank == member.world_size - 1
    gather = Meeting.gather

    def patched(self, step, payload, deadline):
        mine = point.startswith(step) and is_victim and self._number == LAYER
        if mine and "done" not in point:
            (die if "dies" in point else stop)()
        got = gather(self, step, payload, deadline)
        if mine and "done" in point:
            (die if "dies" in point else stop)()
        return got

    Meeting.gather = patched
    if point.startswith("race"):
        _race(member, point)
    member.store.set(f"pid {member.rank}", str(os.getpid()))
    made = []

    def mover(weights):
        made[:] = made or [_mover(weights, SECONDS)]
        return made[0]

    first = move(member, mover, dist.group.WORLD)
    if not is_victim and "stops" in point:
        os.kill(int(member.store.get(f"pid {member.world_size - 1}")), signal.SIGCONT)
    second = move(member, mover, dist.group.WORLD)
    made[0].close()
    return first, second[0], second[2][:1]


@pytest.mark.parametrize(
    ("world", "point", "kind", "news"),
    [
        (3, "before dies", "PeerTimeoutError", [0]),
        (3, "before done dies", "PeerLostError", [0]),
        (3, "before done stops", "PeerTimeoutError", [0]),
        (4, "after dies", "PeerTimeoutError", [0]),
        (3, "after done dies", "PeerTimeoutError", [0, 1]),
        (3, "race, giving up first", "PeerTimeoutError", [0]),
    ],
)
def test_who_dies_or_stops_is_named_and_all_agree_on_what_is_new(on_ranks, world, point, kind, news):
    outcomes = on_ranks(world, _failing, point, check=False)
    ends = [outcome.value for outcome in outcomes if outcome.value is not None]
    assert len(ends) == world - ("dies" in point), [o.error for o in outcomes]
    for (done, wrong, (found, peers, text), took), again, then in ends:
        assert done == news
        assert wrong == [[]] * 3
        assert (found, peers) == (kind, (world - 1,)), text
        assert f"layers 0 to {len(news) - 1} have their new experts" in text
        assert took < 2 * SECONDS + 2
        assert (again, then) == ([], ("PeerLostError",))


def test_who_gives_up_last_commits_with_the_others(on_ranks):
    """All has come, so nobody gives up this layer; all do the next one, for the reason of rank 0."""
    for (done, wrong, (kind, peers, _), took), again, then in on_ranks(3, _failing, "race, last"):
        assert (done, wrong, again) == ([0, 1], [[]] * 3, [])
        assert (kind, peers, then) == ("PeerTimeoutError", (2,), ("PeerLostError",))
        assert took < 2 * SECONDS + 2
