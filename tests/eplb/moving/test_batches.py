import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcomm.eplb.migration import LayerMoves
from tcomm.eplb.moving.batches import (
    MigrationFlow,
    layer_moves,
    schedule_migration_batches,
    schedule_migration_batches_for_layers,
)
from tcomm.errors import ConfigError


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 4))
def test_in_a_batch_each_rank_has_one_partner_and_all_transfers_are_there(seed, world, size):
    generator = np.random.default_rng(seed)
    old, new = (generator.integers(-1, 8, world * size) for _ in range(2))
    batches = schedule_migration_batches(size, old, new)
    for batch in batches:
        ends = [rank for flow in batch for rank in (flow.src_rank, flow.dst_rank)]
        assert len(ends) == len(set(ends))
    moved = [(f.src_rank, f.dst_rank, e) for batch in batches for f in batch for e in f.expert_ids]
    moves = layer_moves(size, old, new)
    assert sorted(moved) == sorted(
        (c.source // size, c.target // size, c.expert) for round_ in moves.rounds for c in round_
    )
    pairs = [(flow.src_rank, flow.dst_rank) for batch in batches for flow in batch]
    assert len(pairs) == len(set(pairs))
    assert all(list(f.expert_ids) == sorted(f.expert_ids) for batch in batches for f in batch)
    assert schedule_migration_batches(size, old.tolist(), new.tolist()) == batches


def test_flows_go_first_come_first_into_the_first_batch_with_room():
    # Rank 0 gives 0 and 1 to rank 1, which gives 2 to rank 2; rank 3 gives 6 to rank 2.
    old, new = [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 0, 1, 2, 6, 6, 7]
    first, second, third = MigrationFlow(0, 1, (0, 1)), MigrationFlow(1, 2, (2,)), MigrationFlow(3, 2, (6,))
    assert schedule_migration_batches(2, old, new) == [[first, third], [second]]
    assert schedule_migration_batches_for_layers(2, [old, old], [new, old]) == [
        [[first, third], [second]],
        [],
    ]
    assert schedule_migration_batches(2, [0, 1, 2, 3], [0, 2, 1, 3]) == [
        [MigrationFlow(0, 1, (1,))],
        [MigrationFlow(1, 0, (2,))],
    ]


def test_maps_that_do_not_fit_are_refused():
    for old, new, size in (([0, 1], [0], 1), ([[0]], [[0]], 1), ([0, 1, 2], [0, 1, 2], 2), ([0], [0], 0)):
        with pytest.raises(ConfigError, match="a multiple of those of a rank"):
            layer_moves(size, old, new)
    with pytest.raises(ConfigError, match="maps of 1 and 2 layers"):
        schedule_migration_batches_for_layers(1, [[0]], [[0], [0]])
    assert layer_moves(2, [], []) == LayerMoves((), (), (), ())
