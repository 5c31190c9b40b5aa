import dataclasses

import numpy as np
import pytest
import torch

from tcomm.eplb import policies
from tcomm.eplb.bound import balancedness_bound
from tcomm.eplb.incremental import CopyCosts
from tcomm.eplb.maps import balancedness, initial_map, keeps_groups_on_nodes
from tcomm.eplb.plans import make_plan, plan_of, replan, where_experts_go
from tcomm.eplb.policies import AbstractEplbPolicy
from tcomm.eplb.shapes import Shape
from tcomm.errors import ConfigError
from tests.eplb.worlds import GOLDEN_LOAD, GOLDEN_MAP, GOLDEN_SHAPE, assert_valid

SHAPE = Shape(64, 80, 8, 2, 16)
LOAD = np.random.default_rng(0).lognormal(0, 1, (5, 64))
LATER = LOAD * np.random.default_rng(1).lognormal(0, 0.2, LOAD.shape)


def test_a_plan_has_maps_figures_and_reasons():
    plan = make_plan(LOAD, SHAPE)
    assert_valid(plan.phy2log, plan.log2phy, plan.logcnt, SHAPE)
    assert plan.log2phy.shape == (5, 64, 17)
    np.testing.assert_array_equal(plan.balancedness, balancedness(plan.phy2log, LOAD, 16))
    np.testing.assert_array_equal(plan.bound, balancedness_bound(LOAD, SHAPE))
    assert (plan.balancedness <= plan.bound + 1e-12).all()
    assert plan.seconds > 0
    assert (plan.policy, plan.reason) == ("search", "hierarchical: each of 8 groups is on one of 2 nodes")
    assert keeps_groups_on_nodes(plan.phy2log, SHAPE)


def test_the_default_policy_is_the_known_plan():
    plan = make_plan(GOLDEN_LOAD, GOLDEN_SHAPE, policy="default")
    assert plan.phy2log.tolist() == GOLDEN_MAP
    assert plan.policy == "default"


def test_where_experts_may_go():
    assert where_experts_go(Shape(64, 80, 8, 1, 16)).startswith("one node")
    assert where_experts_go(Shape(64, 80, 8, 3, 16)).startswith("global: 3 nodes do not divide 8 groups")


def test_layers_without_load_keep_the_old_map_or_the_initial_one():
    load = LOAD.copy()
    load[[1, 3]] = 0
    for policy in policies.EPLB_POLICIES:
        plan = make_plan(load, SHAPE, policy=policy)
        assert plan.phy2log[1].tolist() == plan.phy2log[3].tolist() == initial_map(SHAPE).tolist()
        assert plan.balancedness[1] == plan.bound[1] == 1
    old = make_plan(LATER, SHAPE)
    again = make_plan(load, SHAPE, current=old.phy2log)
    np.testing.assert_array_equal(again.phy2log[[1, 3]], old.phy2log[[1, 3]])
    none = make_plan(0 * load, SHAPE, current=old.phy2log)
    assert none.diff(old.phy2log).num_copies == 0
    nearby = replan(load, SHAPE, current=old.phy2log)
    np.testing.assert_array_equal(nearby.phy2log[1], old.phy2log[1])


def test_a_replan_moves_little_and_gains_most_of_it():
    old = make_plan(LOAD, SHAPE)
    full, near = (
        make_plan(LATER, SHAPE, current=old.phy2log),
        replan(LATER, SHAPE, current=old.phy2log, max_moves=8),
    )
    assert near.diff(old.phy2log).num_copies <= 8 * 5 < full.diff(old.phy2log).num_copies / 2
    kept = balancedness(old.phy2log, LATER, 16).mean()
    assert near.balancedness.mean() > (kept + full.balancedness.mean()) / 2
    assert near.policy == "incremental"
    assert near.reason == "from the current map: at most 8 copies a layer"
    assert keeps_groups_on_nodes(near.phy2log, SHAPE)
    paying = replan(LATER, SHAPE, current=old.phy2log, costs=CopyCosts(44e6, 50, 1e9))
    assert paying.reason == "from the current map: no limit, as long as they pay"


def test_a_current_map_across_nodes_is_planned_for_globally():
    across = make_plan(LOAD, SHAPE.everywhere()).phy2log
    plan = replan(LATER, SHAPE, current=across, max_moves=8)
    assert plan.shape == SHAPE.everywhere()
    assert plan.reason.endswith("; the map has groups on several nodes, so any expert may be on any GPU")
    named = make_plan(LATER, SHAPE, policy="incremental", current=across)
    assert named.shape == SHAPE.everywhere()
    assert named.reason.startswith("global: the map has groups on several nodes")
    assert (named.balancedness <= named.bound + 1e-12).all()


def test_the_difference_is_what_has_to_be_copied():
    plan = make_plan(LOAD, SHAPE)
    assert plan.diff(plan.phy2log).num_copies == 0
    with pytest.raises(ConfigError, match="cannot be compared"):
        plan.diff(plan.phy2log[:, :-1])


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"load": LOAD[:, :-1]}, "the load is of 63 experts; the shape has 64"),
        ({"load": -LOAD}, "give numbers from 0 to"),
        ({"current": np.zeros((5, 79), int)}, r"the current map is int64 \[5, 79\]"),
        ({"policy": "best"}, "policy 'best' is unknown; there are default, search, incremental"),
    ],
)
def test_what_makes_no_sense_is_refused(change, rule):
    given = {"load": LOAD, "policy": "search", "current": None} | change
    with pytest.raises(ConfigError, match=rule):
        make_plan(given["load"], SHAPE, policy=given["policy"], current=given["current"])
    if "policy" not in change:
        current = np.tile(initial_map(SHAPE), (5, 1)) if given["current"] is None else given["current"]
        with pytest.raises(ConfigError, match=rule):
            replan(given["load"], SHAPE, current=current)


class _Wrong(AbstractEplbPolicy):
    @classmethod
    def rebalance_experts(cls, weight, num_replicas, num_groups, num_nodes, num_ranks, old=None):
        return torch.zeros(len(weight), num_replicas, dtype=torch.int64), None, None


def test_a_policy_that_answers_nonsense_is_refused(monkeypatch):
    monkeypatch.setitem(policies.EPLB_POLICIES, "wrong", _Wrong)
    with pytest.raises(ConfigError, match="what policy 'wrong' made has no slot with expert 1 in layer 0"):
        make_plan(LOAD, SHAPE, policy="wrong")


def test_a_plan_of_any_map_is_measured():
    phy2log = np.tile(initial_map(SHAPE), (5, 1))
    plan = plan_of(phy2log, LOAD, SHAPE, seconds=1.5, policy="by hand", reason="to see")
    np.testing.assert_array_equal(plan.balancedness, balancedness(phy2log, LOAD, 16))
    assert dataclasses.astuple(dataclasses.replace(plan, shape=None))[-3:] == (1.5, "by hand", "to see")
    with pytest.raises(ConfigError, match="expert 99"):
        plan_of(phy2log + 99, LOAD, SHAPE, seconds=0, policy="", reason="")
