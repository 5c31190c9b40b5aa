import numpy as np

from tcomm.eplb.migration import migration
from tcomm.eplb.moving.rearrange import has_moves, rearrange_expert_weights_inplace
from tcomm.eplb.moving.symmetric import SymmetricMover
from tcomm.groups.setup import from_store
from tests.eplb.moving.weights import ROW_NBYTES, Layers, random_maps


def _mover(member, weights, timeout=20):
    members = from_store(member.store, member.rank, member.world_size, "experts")
    return SymmetricMover(members, weights, timeout=timeout)


def _random(member, cases, size):
    """What is wrong after each of some moves by one mover; and the bytes and waits that they took."""
    generator = np.random.default_rng(member.world_size)
    wrong, taken, needed, mover = [], [], [], None
    for _ in range(cases):
        old, new = random_maps(generator, 3, member.world_size, size)
        layers = Layers.filled(old, member.rank, size)
        mover = mover or _mover(member, layers.weights[0])
        before = mover.space.traffic.wire_nbytes, mover.space.traffic.num_phases
        moves = migration(old, new, member.world_size).layers
        for layer, each in enumerate(moves):
            if has_moves(each):
                mover.prepare(layer, each, layers.weights[layer])
                mover.commit(layer, each, layers.weights[layer])
        after = mover.space.traffic.wire_nbytes, mover.space.traffic.num_phases
        taken.append((after[0] - before[0], after[1] - before[1]))
        copies = [copy for each in moves for round_ in each.rounds for copy in round_]
        mine = sum(copy.target // size == member.rank for copy in copies)
        needed.append((mine * ROW_NBYTES, 2 * sum(map(has_moves, moves))))
        wrong += [layers.wrong(layer, old[layer], new[layer]) for layer in range(3)]
    nbytes = mover.space.arena.staging.buffer.nbytes
    mover.close()
    mover.close()
    return wrong, taken, needed, nbytes


def test_random_maps_move_byte_exactly_and_each_expert_once(on_ranks):
    for world, cases in ((2, 8), (3, 6)):
        for wrong, taken, needed, _ in on_ranks(world, _random, cases, 4):
            assert wrong == [[]] * (3 * cases)
            assert taken == needed
