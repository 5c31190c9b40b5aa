import itertools

import numpy as np

from tcomm.eplb.replicas import replicate


def test_each_further_replica_goes_to_the_expert_with_the_most_for_one():
    experts, numbers, counts = replicate(np.array([[6.0, 4, 1], [1, 1, 1]]), 6)
    assert experts.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 0, 1, 2]]
    assert numbers.tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 1]]
    assert counts.tolist() == [[3, 2, 1], [2, 2, 2]]


def test_no_other_counts_have_a_lighter_heaviest_replica():
    load = np.random.default_rng(0).lognormal(0, 1, (20, 4))
    _, _, counts = replicate(load, 8)
    others = [c for c in itertools.product(range(1, 6), repeat=4) if sum(c) == 8]
    best = np.min([(load / np.array(c)).max(axis=1) for c in others], axis=0)
    np.testing.assert_allclose((load / counts).max(axis=1), best)
