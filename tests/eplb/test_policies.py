import numpy as np
import pytest
import torch

from tcomm.eplb.balance import balanced_maps
from tcomm.eplb.maps import balancedness, keeps_groups_on_nodes
from tcomm.eplb.migration import migration
from tcomm.eplb.policies import (
    EPLB_POLICIES,
    AbstractEplbPolicy,
    DefaultEplbPolicy,
    IncrementalEplbPolicy,
    SearchEplbPolicy,
    policy_named,
    register_policy,
)
from tcomm.eplb.reference import reference_preserved
from tcomm.eplb.shapes import Shape
from tcomm.errors import ConfigError
from tests.eplb.worlds import GOLDEN_LOAD, GOLDEN_MAP, GOLDEN_SHAPE, assert_valid, random_map

NUMBERS = (16, 4, 2, 8)
LOAD = torch.tensor(GOLDEN_LOAD)


def _arrays(maps):
    assert all(part.dtype == torch.int64 for part in maps)
    return tuple(part.numpy() for part in maps)


def test_the_default_policy_makes_the_known_plan():
    maps = _arrays(DefaultEplbPolicy.rebalance_experts(LOAD, *NUMBERS))
    assert maps[0].tolist() == GOLDEN_MAP
    for got, wanted in zip(maps, balanced_maps(GOLDEN_LOAD, GOLDEN_SHAPE), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("seed", range(5))
def test_the_default_policy_keeps_slots_and_the_order_of_replicas(seed):
    old = random_map(np.random.default_rng(seed), 2, GOLDEN_SHAPE)
    old[0, seed] = -1
    got = _arrays(DefaultEplbPolicy.rebalance_experts(LOAD, *NUMBERS, torch.tensor(old)))
    phy2log, log2phy, logcnt = balanced_maps(GOLDEN_LOAD, GOLDEN_SHAPE)
    source = reference_preserved(old, phy2log, 8)
    np.testing.assert_array_equal(got[0], np.take_along_axis(phy2log, source, axis=1))
    assert_valid(*got, GOLDEN_SHAPE)
    # Replica n of an expert is the same replica, wherever its entry went.
    for layer, expert, number in np.argwhere(log2phy >= 0):
        assert source[layer, got[1][layer, expert, number]] == log2phy[layer, expert, number]
    np.testing.assert_array_equal(got[2], logcnt)


@pytest.mark.parametrize("policy", EPLB_POLICIES.values())
def test_a_layer_without_load_keeps_its_map(policy):
    old = random_map(np.random.default_rng(0), 2, GOLDEN_SHAPE)
    idle = LOAD.clone()
    idle[0] = 0
    maps = _arrays(policy.rebalance_experts(idle, *NUMBERS, torch.tensor(old)))
    assert maps[0][0].tolist() == old[0].tolist()
    assert_valid(*maps, GOLDEN_SHAPE)
    # What holds not every expert cannot be kept.
    old[0] = 0
    maps = _arrays(policy.rebalance_experts(idle, *NUMBERS, torch.tensor(old)))
    assert_valid(*maps, GOLDEN_SHAPE)


def _uneven():
    load = np.random.default_rng(0).lognormal(0, 1, (3, 64))
    return load, Shape(64, 80, 8, 2, 16), (80, 8, 2, 16)


def test_the_search_is_more_even_and_keeps_slots_too():
    load, shape, numbers = _uneven()
    plain, found = (
        _arrays(p.rebalance_experts(torch.tensor(load), *numbers))
        for p in (DefaultEplbPolicy, SearchEplbPolicy)
    )
    assert_valid(*found, shape)
    assert balancedness(found[0], load, 16).mean() > balancedness(plain[0], load, 16).mean() + 0.005
    assert keeps_groups_on_nodes(found[0], shape)
    again = _arrays(
        SearchEplbPolicy.rebalance_experts(
            torch.tensor(load), *numbers, torch.tensor(found[0][:, ::-1].copy())
        )
    )
    np.testing.assert_array_equal(
        again[0], np.take_along_axis(found[0], reference_preserved(found[0][:, ::-1], found[0], 16), axis=1)
    )


@pytest.mark.parametrize("across", [False, True])
def test_the_incremental_policy_moves_a_quarter_at_most(across):
    load, shape, numbers = _uneven()
    places = shape.everywhere() if across else shape
    old = SearchEplbPolicy.place_experts(torch.tensor(load), 80, places.num_groups, places.num_nodes, 16)
    drifted = load * np.random.default_rng(1).lognormal(0, 0.3, load.shape)
    maps = _arrays(IncrementalEplbPolicy.rebalance_experts(torch.tensor(drifted), *numbers, old))
    assert_valid(*maps, shape)
    assert 0 < migration(old.numpy(), maps[0], 16).num_copies <= 3 * 20
    assert keeps_groups_on_nodes(maps[0], shape) != across
    assert balancedness(maps[0], drifted, 16).mean() > balancedness(old.numpy(), drifted, 16).mean() + 0.05


def test_the_incremental_policy_searches_where_there_is_no_map():
    load, _, numbers = _uneven()
    got, wanted = (
        p.place_experts(torch.tensor(load), *numbers) for p in (IncrementalEplbPolicy, SearchEplbPolicy)
    )
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("policy", EPLB_POLICIES.values())
def test_the_map_alone(policy):
    old = torch.tensor(random_map(np.random.default_rng(3), 2, GOLDEN_SHAPE))
    whole = policy.rebalance_experts(LOAD, *NUMBERS, old)
    assert torch.equal(policy.place_experts(LOAD, *NUMBERS, old), whole[0])


@pytest.mark.parametrize("policy", EPLB_POLICIES.values())
@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"weight": LOAD.float() / 0}, "is (nan|inf); give numbers from 0 to"),
        ({"weight": -LOAD}, "is -90"),
        ({"weight": LOAD[0]}, r"a load of shape \[12\] is wrong"),
        ({"num_replicas": 8}, "8 replicas are fewer than 12 experts"),
        ({"num_replicas": 17}, "must be a multiple of num_gpus"),
        ({"old": torch.zeros(2, 15, dtype=torch.int64)}, r"old_global_expert_indices is int64 \[2, 15\]"),
        ({"old": torch.full((2, 16), 12)}, "has expert 12 in slot 0 of layer 0"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_rule(policy, change, rule):
    given = {"weight": LOAD, "num_replicas": 16, "old": None} | change
    with pytest.raises(ConfigError, match=rule):
        policy.rebalance_experts(given["weight"], given["num_replicas"], 4, 2, 8, given["old"])


class _Mine(AbstractEplbPolicy):
    @classmethod
    def rebalance_experts(cls, weight, num_replicas, num_groups, num_nodes, num_ranks, old=None):
        return ("mine",)


def test_policies_are_found_by_name(monkeypatch):
    assert {
        "default": DefaultEplbPolicy, "search": SearchEplbPolicy, "incremental": IncrementalEplbPolicy,
    } == EPLB_POLICIES  # fmt: skip
    monkeypatch.delitem(EPLB_POLICIES, "incremental")
    register_policy("incremental", _Mine)
    assert policy_named("incremental") is _Mine
    assert _Mine.place_experts(None, 1, 1, 1, 1) == "mine"
    with pytest.raises(ConfigError, match="'incremental' is empty or taken"):
        register_policy("incremental", _Mine)
    with pytest.raises(ConfigError, match="'' is empty or taken"):
        register_policy("", _Mine)
    with pytest.raises(ConfigError, match="is no subclass of AbstractEplbPolicy"):
        register_policy("text", "no class")
    with pytest.raises(
        ConfigError, match="policy 'other' is unknown; there are default, search, incremental"
    ):
        policy_named("other")
    with pytest.raises(TypeError, match="abstract"):
        AbstractEplbPolicy()
