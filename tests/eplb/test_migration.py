import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcomm.eplb.migration import Copy, migration
from tcomm.eplb.shapes import Shape
from tcomm.errors import ConfigError
from tests.eplb.worlds import random_map

SHAPE = Shape(9, 12, 1, 1, 4)


def _carried_out(old, layer):
    """What the slots hold when every source is read first, and duplicates last."""
    slots = list(old)
    for copy in [copy for round_ in layer.rounds for copy in round_] + list(layer.local):
        assert old[copy.source] == copy.expert
        slots[copy.target] = copy.expert
    for copy in layer.duplicates:
        assert slots[copy.source] == copy.expert
        slots[copy.target] = copy.expert
    return slots


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 4, 12]))
def test_it_leads_to_the_new_map_in_as_few_rounds_as_can_be(seed, gpus):
    generator = np.random.default_rng(seed)
    old, new = (random_map(generator, 3, SHAPE) for _ in range(2))
    size = 12 // gpus
    moves = migration(old, new, gpus)
    for layer, before, after in zip(moves.layers, old.tolist(), new.tolist(), strict=True):
        assert _carried_out(before, layer) == after
        assert layer.missing == ()
        busy = collections.Counter()
        received = collections.Counter()
        for round_ in layer.rounds:
            senders, receivers = (
                [slot // size for slot in ends]
                for ends in zip(*((c.source, c.target) for c in round_), strict=True)
            )
            assert len(set(senders)) == len(senders)
            assert len(set(receivers)) == len(receivers)
            busy.update([("from", rank) for rank in senders] + [("to", rank) for rank in receivers])
            received.update((copy.expert, copy.target // size) for copy in round_)
        assert len(layer.rounds) == max(busy.values(), default=0)
        assert set(received.values()) <= {1}
        assert all(expert not in before[r * size : (r + 1) * size] for expert, r in received)
    assert moves.num_copies == sum(len(r) for layer in moves.layers for r in layer.rounds)
    assert moves.num_rounds == sum(len(layer.rounds) for layer in moves.layers)


def test_the_same_map_moves_nothing():
    old = random_map(np.random.default_rng(0), 2, SHAPE)
    moves = migration(old, old, 4)
    assert (moves.num_copies, moves.num_rounds) == (0, 0)
    assert all(not layer.local and not layer.duplicates for layer in moves.layers)


def test_copies_local_duplicate_and_missing_ones():
    (layer,) = migration(np.array([[0, 1, 2, -1]]), np.array([[1, 1, 0, 0]]), 2).layers
    assert layer.rounds == ((Copy(0, 0, 2),),)
    assert layer.local == (Copy(1, 1, 0),)
    assert layer.duplicates == (Copy(0, 2, 3),)
    assert layer.has_copies
    (layer,) = migration(np.array([[0, 1, 2, -1]]), np.array([[5, -1, 2, 5]]), 2).layers
    assert layer.missing == (0, 3)
    assert layer.rounds == layer.local == ()
    assert not layer.has_copies
    assert migration(np.array([[0, 1]]), np.array([[1, 1]]), 1).layers[0].has_copies


def test_senders_serve_receivers_in_order_and_share_what_is_left():
    # Ranks 1 and 3 have expert 0; ranks 0, 2, 4, 5 and 6 need it.
    old, new = np.array([[1, 0, 2, 0, 3, 4, 5]]), np.array([[0, 0, 0, 0, 0, 0, 0]])
    (layer,) = migration(old, new, 7).layers
    pairs = sorted((copy.target, copy.source) for round_ in layer.rounds for copy in round_)
    assert pairs == [(0, 1), (2, 1), (4, 3), (5, 3), (6, 1)]
    # Three ranks have it and five need it: the two that are left go to the first two.
    (layer,) = migration(np.array([[0, 0, 0, 1, 1, 1, 1, 1]]), np.zeros((1, 8), int), 8).layers
    pairs = sorted((copy.target, copy.source) for round_ in layer.rounds for copy in round_)
    assert pairs == [(3, 0), (4, 1), (5, 2), (6, 0), (7, 1)]
    few = migration(np.array([[0, 0, 0, 1]]), np.array([[0, 0, 0, 0]]), 4).layers[0]
    assert few.rounds == ((Copy(0, 0, 3),),)


@pytest.mark.parametrize(
    ("old", "new", "gpus", "rule"),
    [
        (np.zeros((1, 4), int), np.zeros((1, 6), int), 2, r"\[1, 4\] and \[1, 6\] cannot be compared"),
        (np.zeros(4, int), np.zeros(4, int), 2, r"\[4\] and \[4\] cannot be compared"),
        (np.zeros((1, 4), int), np.zeros((1, 4), int), 3, "4 slots cannot be shared evenly by 3 GPUs"),
        (np.zeros((1, 4), int), np.zeros((1, 4), int), 0, "by 0 GPUs"),
    ],
)
def test_maps_that_cannot_be_compared_are_refused(old, new, gpus, rule):
    with pytest.raises(ConfigError, match=rule):
        migration(old, new, gpus)
