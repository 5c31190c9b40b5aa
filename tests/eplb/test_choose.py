import dataclasses

import numpy as np
import pytest

from tcomm.eplb.choose import StepCosts, choose, step_seconds
from tcomm.eplb.maps import keeps_groups_on_nodes
from tcomm.eplb.plans import make_plan
from tcomm.eplb.shapes import Shape
from tcomm.errors import ConfigError

SHAPE = Shape(64, 80, 8, 2, 16)
EVEN = np.random.default_rng(0).uniform(0.9, 1.1, (3, 64))
SKEWED = EVEN * np.where(np.arange(64) < 8, 20, 1)


def test_a_step_is_the_busiest_gpu_and_what_comes_from_other_nodes():
    costs = StepCosts(tokens=100, node_gbps=1e-6, nbytes_per_token=10, seconds_per_token=0.5, top_k=2)
    shape, phy2log = Shape(4, 4, 2, 2, 2), np.array([[0, 1, 2, 3]])
    experts, network = step_seconds(phy2log, np.array([[3.0, 1, 0, 0]]), shape, costs, grouped=True)
    # All of 200 choices on GPU 0; half of 100 tokens come from the other node, 10 bytes at 1000 a second.
    np.testing.assert_allclose(experts, [100])
    np.testing.assert_allclose(network, [0.5])
    experts, network = step_seconds(phy2log, np.array([[1.0, 1, 1, 1]]), shape, costs, grouped=True)
    np.testing.assert_allclose([experts, network], [[50], [0.5 * 0.75]])
    one = dataclasses.replace(costs, groups_per_token=1)
    for grouped, reached in ((True, 0.5), (False, 0.75)):
        _, network = step_seconds(phy2log, np.array([[1.0, 1, 1, 1]]), shape, one, grouped=grouped)
        np.testing.assert_allclose(network, [0.5 * reached])


def test_no_load_takes_no_time():
    experts, _ = step_seconds(
        np.array([[0, 1]]), np.zeros((1, 2)), Shape(2, 2, 2, 2, 2), StepCosts(1), grouped=True
    )
    assert experts.tolist() == [0]


def test_a_skewed_load_is_spread_and_an_even_one_stays_on_nodes():
    costs = StepCosts(tokens=4096, groups_per_token=1)
    anywhere, on_nodes = choose(SKEWED, SHAPE, costs), choose(EVEN, SHAPE, costs)
    assert anywhere.reason.startswith("global: ")
    assert not keeps_groups_on_nodes(anywhere.phy2log, SHAPE)
    assert on_nodes.reason.startswith("hierarchical: ")
    assert keeps_groups_on_nodes(on_nodes.phy2log, SHAPE)
    for plan in (anywhere, on_nodes):
        assert " ms a step predicted, " in plan.reason.split(" < ")[1]
        assert plan.seconds > 0
    np.testing.assert_array_equal(on_nodes.phy2log, make_plan(EVEN, SHAPE).phy2log)


def test_without_groups_on_nodes_there_is_no_choice():
    costs = StepCosts(tokens=4096)
    assert choose(SKEWED, Shape(64, 80, 8, 1, 16), costs).reason.startswith("one node")
    plan = choose(SKEWED, Shape(64, 80, 8, 3, 16), costs, policy="default")
    assert plan.reason.startswith("global: 3 nodes do not divide 8 groups")
    assert plan.policy == "default"


@pytest.mark.parametrize(
    "field", ["tokens", "node_gbps", "nbytes_per_token", "seconds_per_token", "top_k", "groups_per_token"]
)
def test_costs_are_above_0(field):
    for value in (0, -1, float("nan")):
        with pytest.raises(ConfigError, match=f"{field}=.* is wrong; give a number above 0"):
            StepCosts(**({"tokens": 1} | {field: value}))
