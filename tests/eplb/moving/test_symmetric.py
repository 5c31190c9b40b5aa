import gc
import os
import signal
import time

import numpy as np
import pytest
import torch

from tcomm.eplb.migration import migration
from tcomm.eplb.moving.rows import LayerRows
from tcomm.eplb.moving.symmetric import SymmetricMover
from tcomm.groups.setup import from_store
from tcomm.groups.stateless.group import StatelessProcessGroup
from tcomm.memory.layout import StagingLayout
from tcomm.memory.verdicts import Verdicts
from tests.eplb.moving.failures import LAYER, SECONDS, around_publish, die, move, stop
from tests.eplb.moving.weights import KINDS, ROW_NBYTES, Layers, random_maps
from tests.groups.all2all.worlds import told
from tests.memory.fake_symm_mem import give_workspaces_device_memory


def _mover(member, weights, timeout=20):
    members = from_store(member.store, member.rank, member.world_size, "experts")
    return SymmetricMover(members, weights, timeout=timeout)


def _read_slowly(self, copy):
    time.sleep(0.002)
    return SymmetricMover._rows_at(self, copy)


def _random(member, cases, size):
    """What is wrong after each of some moves by one mover; and the bytes and waits that they took."""
    if member.rank == member.world_size - 1:
        # The others are a layer ahead, and must not write what it still reads.
        SymmetricMover._rows_at, SymmetricMover._brought = SymmetricMover._brought, _read_slowly
    generator = np.random.default_rng(member.world_size)
    wrong, taken, needed, mover = [], [], [], None
    for case in range(cases):
        old, new = random_maps(generator, 3, member.world_size, size)
        layers = Layers.filled(old, member.rank, size)
        with torch.inference_mode(member.world_size == 3):
            mover = mover or _mover(member, layers.weights[0])
        before = mover.space.traffic.wire_nbytes, mover.space.traffic.num_phases
        moves = migration(old, new, member.world_size).layers
        for layer, each in enumerate(moves):
            with torch.inference_mode(case % 2 == 1):
                if each.has_copies:
                    mover.prepare(layer, each, layers.weights[layer])
                    mover.commit(layer, each, layers.weights[layer])
        after = mover.space.traffic.wire_nbytes, mover.space.traffic.num_phases
        taken.append((after[0] - before[0], after[1] - before[1]))
        copies = [copy for each in moves for round_ in each.rounds for copy in round_]
        mine = sum(copy.target // size == member.rank for copy in copies)
        needed.append((mine * ROW_NBYTES, 2 * sum(each.has_copies for each in moves)))
        wrong += [layers.wrong(layer, old[layer], new[layer]) for layer in range(3)]
    nbytes = mover.space.arena.staging.buffer.nbytes
    refused = _refused(member, mover, layers.weights[0], old[:1], new[:1])
    names = _verdicts(mover)
    member.meet("listed")
    mover.close()
    mover.close()
    member.meet("closed")
    return wrong, taken, needed, nbytes, len(names), refused, _verdicts(mover)


def _dropped(member):
    """Movers that nobody closes."""
    layers = Layers.filled([range(4)], member.rank, 2)
    mover = _mover(member, layers.weights[0])
    moves = migration([range(4)], [[2, 3, 0, 1]], 2).layers[0]
    mover.prepare(0, moves, layers.weights[0])
    prefix, directory = mover._verdicts.prefix, mover.space.config.shm_dir
    member.meet("prepared")
    child = os.fork()
    if not child:
        mover.close()
        del mover
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    there = [os.path.lexists(f"{prefix}-2-0")]
    for word in (True, False):
        # Rank 1 speaks first.
        if member.rank == 0:
            member.meet("spoken")
        there.append(mover.settle(word == bool(member.rank)))
        if member.rank == 1:
            member.meet("spoken")
        mover.commit(0, moves, layers.weights[0])
        mover.prepare(0, moves, layers.weights[0])
    member.meet("looked")
    del mover
    gc.collect()
    member.meet("dropped")
    return there, [name for name in os.listdir(directory) if os.path.basename(prefix) in name]


def test_movers_that_are_dropped_leave_nothing_behind_and_a_child_takes_nothing(on_ranks):
    assert on_ranks(2, _dropped) == [([True, True, False], [])] * 2


def _settles_late(member):
    """What a rank hears that asks when the others have switched the layer and left."""
    layers = Layers.filled([range(4)], member.rank, 2)
    mover = _mover(member, layers.weights[0])
    mover.prepare(0, migration([range(4)], [[2, 3, 0, 1]], 2).layers[0], layers.weights[0])
    if member.rank == 1:
        member.meet("left")
    heard = mover.settle(member.rank == 0)
    mover.close()
    if member.rank == 0:
        member.meet("left")
    member.meet("closed")
    return heard, _verdicts(mover)


def test_who_asks_late_hears_what_those_heard_who_have_left(on_ranks):
    assert on_ranks(2, _settles_late) == [(True, [])] * 2


def _verdicts(mover):
    """Names in the memory file system that belong to the mover."""
    prefix = os.path.basename(mover._verdicts.prefix)
    return [name for name in os.listdir(mover.space.config.shm_dir) if name.startswith(prefix)]


def _refused(member, mover, weights, old, new):
    """What the mover says to calls out of place, with other weights and of other layers; and to none."""
    moves = migration(old, new, member.world_size).layers[0]
    told_of = [
        told(mover.prepare, 0, moves, weights[:-1])[1],
        told(mover.reserve, weights[:-1])[1],
        told(mover.commit, 0, moves, weights)[1],
        # They have other moves for the same layer; then the mover goes on.
        told(mover.prepare, 5 + member.rank, moves, weights)[1],
    ]
    mover.prepare(0, moves, weights)
    mover.reserve(weights)
    staged = [int(row.abs().max()) for row in mover._staged[member.rank] if row.numel()]
    told_of += [told(mover.commit, 0, moves, weights)[1], told(mover.settle, True)[1]]
    mover.prepare(0, moves, weights)
    return told_of, staged


def test_random_maps_move_byte_exactly_and_each_expert_once(on_ranks):
    size = 4
    layer = LayerRows.of(Layers.filled([range(size)], 0, size).weights[0])
    assert size * ROW_NBYTES <= layer.nbytes < size * ROW_NBYTES + 16 * len(KINDS)
    for world, cases in ((2, 5), (3, 4), (4, 4), (8, 1)):
        results = on_ranks(world, _random, cases, size)
        assert [result[0] for result in results] == [[[]] * (3 * cases)] * world
        for _, taken, needed, nbytes, names, refused, left in results:
            assert taken == needed
            assert nbytes == StagingLayout.for_half(-(-layer.nbytes // 2), world)
            assert (names, left) == (1, [])
            texts, staged = refused
            expected = [
                "and those of the first layer",
                "and those of the first layer",
                "layer 0, which was not prepared",
                "the ranks called different things\n  rank 0: take_experts rows [5, 4]",
                "layer 0, which was not prepared",
                "settle without a layer",
            ]
            assert [part in text for part, text in zip(expected, texts, strict=True)] == [True] * 6
            assert staged == [0] * 6


class _Work:
    """Notes what the mover waits for on its device, among what it tells its peers."""

    def __init__(self, mover):
        self.told = []
        publish = mover.space.publish

        def publish_and_note(epoch, call):
            self.told.append(call.op)
            publish(epoch, call)

        mover.space.publish = publish_and_note

    def wait_for_rows(self):
        self.told.append("rows are there")

    def note_weights(self):
        self.told.append("weights are being written")

    def wait_for_weights(self):
        self.told.append("weights are written")


def _on_device(member):
    give_workspaces_device_memory(member)
    old, new = random_maps(np.random.default_rng(5), 2, member.world_size, 3)
    layers = Layers.filled(old, member.rank, 3)
    mover = _mover(member, layers.weights[0])
    assert mover.space.arena is not mover.space.host_arena
    mover._work = _Work(mover)
    mover.reserve(layers.weights[0])
    for layer, moves in enumerate(migration(old, new, member.world_size).layers):
        mover.prepare(layer, moves, layers.weights[layer])
        mover.commit(layer, moves, layers.weights[layer])
    mover.close()
    return [layers.wrong(layer, old[layer], new[layer]) for layer in range(2)], mover._work.told


def test_peers_are_told_of_a_device_what_it_has_done(on_ranks):
    for wrong, told_peers in on_ranks(2, _on_device):
        assert wrong == [[], []]
        layer = ["weights are written", "take_experts", "rows are there", "give_experts"]
        reserved = ["weights are written", "reserve_experts", "rows are there"]
        assert told_peers == reserved + 2 * [*layer, "weights are being written"]


def _tell_rank_0_alone(space):
    space._channel._peer_words = space._channel._peer_words[:1]


POINTS = {
    "before": (die, None),
    "after": (None, die),
    "told one, who is slow": (_tell_rank_0_alone, die),
    "told one, others are slow": (_tell_rank_0_alone, die),
    "before, stopped": (stop, None),
    "after, stopped": (None, stop),
    "told one, stopped": (_tell_rank_0_alone, stop),
}
"""What the last rank does before and after it tells that its rows are there."""
SLOW = {"told one, who is slow": 0, "told one, others are slow": 1}
"""Who is never the first to propose a verdict."""


def _propose_slowly():
    propose = Verdicts.propose

    def patched(self, told, epoch, number=0):
        began = time.monotonic()
        while not self.exists(epoch, number) and time.monotonic() < began + 10:
            time.sleep(0.001)
        return propose(self, told, epoch, number)

    Verdicts.propose = patched


def _failing(member, point):
    """The last rank dies or stops at a point; what the others find, and a second move by the same mover."""
    is_victim = member.rank == member.world_size - 1
    on_layer = _die_after_the_layer if is_victim and point == "between" else None
    if is_victim and point in POINTS:
        around_publish(*POINTS[point])
    elif member.rank == SLOW.get(point):
        _propose_slowly()
    member.store.set(f"pid {member.rank}", str(os.getpid()))
    group = StatelessProcessGroup(member.rank, member.world_size, member.store, None)
    made = []

    def mover(weights):
        made[:] = made or [_mover(member, weights, SECONDS)]
        return made[0]

    first = move(member, mover, group, on_layer)
    if not is_victim and point.endswith("stopped"):
        os.kill(int(member.store.get(f"pid {member.world_size - 1}")), signal.SIGCONT)
    second = move(member, mover, group)
    made[0].close()
    return first, second[0], second[2][:2]


def _die_after_the_layer(layer):
    if layer == LAYER:
        die()


@pytest.mark.parametrize(
    ("world", "point", "kind", "news"),
    [
        (3, "before", "PeerLostError", [0]),
        (3, "after", "PeerLostError", [0, 1]),
        (4, "between", "PeerLostError", [0, 1]),
        (3, "told one, who is slow", "PeerLostError", [0]),
        (3, "told one, others are slow", "PeerLostError", [0, 1]),
        (3, "before, stopped", "PeerTimeoutError", [0]),
        (4, "after, stopped", "PeerTimeoutError", [0, 1]),
        (3, "told one, stopped", "PeerTimeoutError", [0, 1]),
    ],
)
def test_who_dies_or_stops_is_named_and_all_agree_on_what_is_new(on_ranks, world, point, kind, news):
    outcomes = on_ranks(world, _failing, point, check=False)
    ends = [outcome.value for outcome in outcomes if outcome.value is not None]
    assert len(ends) == world - (kind == "PeerLostError"), [o.error for o in outcomes]
    for (done, wrong, (found, peers, text), took), again, then in ends:
        assert done == news
        assert wrong == [[]] * 3
        assert (found, peers) == (kind, (world - 1,))
        assert f"layers 0 to {len(news) - 1} have their new experts" in text
        assert took < 2 * SECONDS + 1
        assert (again, then) == ([], (kind, (world - 1,)))
