import numpy as np
import pytest

from tcomm.eplb.balance import balanced_slots
from tcomm.eplb.incremental import CopyCosts, nearby_map
from tcomm.eplb.maps import balancedness
from tcomm.eplb.migration import migration
from tcomm.eplb.shapes import Shape
from tcomm.errors import ConfigError

SHAPE = Shape(64, 80, 1, 1, 16)
OLD_LOAD = np.random.default_rng(0).lognormal(0, 1, (6, 64))
LOAD = OLD_LOAD * np.random.default_rng(1).lognormal(0, 0.2, OLD_LOAD.shape)
CURRENT = balanced_slots(OLD_LOAD, SHAPE)[0]


def _even(phy2log):
    return balancedness(phy2log, LOAD, 16).mean()


def test_more_moves_make_it_more_even():
    evens = [_even(nearby_map(LOAD, CURRENT, SHAPE, most)) for most in (0, 4, 8, 20)]
    assert evens[0] >= _even(CURRENT)
    assert evens == sorted(evens)
    assert evens[3] > 0.98 > evens[0] + 0.1
    copies = [migration(CURRENT, nearby_map(LOAD, CURRENT, SHAPE, most), 16).num_copies for most in (0, 4)]
    assert copies[0] == 0 < copies[1] <= 4 * 6
    assert _even(nearby_map(LOAD, CURRENT, SHAPE)) >= evens[3]


def test_a_longer_horizon_pays_for_more_moves():
    moved = [
        (nearby_map(LOAD, CURRENT, SHAPE, costs=CopyCosts(44e6, 50, tokens)) != CURRENT).sum()
        for tokens in (1e2, 1e5, 1e9)
    ]
    assert moved == sorted(moved)
    assert moved[2] > moved[1] > moved[0]


def test_the_price_of_a_copy_in_load():
    # A second for a copy; the choices to come take half a second for each unit of the load's sum.
    costs = CopyCosts(bytes_per_expert=2e9, link_gbps=2, horizon_tokens=10, seconds_per_token=0.1, top_k=2)
    np.testing.assert_allclose(costs.price(np.array([[1.0, 3], [0, 0]])), [2, 0])


def test_a_layer_without_load_stays():
    load = LOAD.copy()
    load[2] = 0
    found = nearby_map(load, CURRENT, SHAPE, 20)
    np.testing.assert_array_equal(found[2], CURRENT[2])
    assert (found[[0, 1, 3]] != CURRENT[[0, 1, 3]]).any()


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"current": CURRENT[:, :-1]}, r"the current map is int64 \[6, 79\]; give integers \[6, 80\]"),
        ({"current": np.zeros_like(CURRENT)}, "no slot with expert 1 in layer 0"),
        ({"load": -LOAD}, "give numbers from 0 to"),
        ({"max_moves": -1}, "max_moves=-1 is wrong"),
        ({"max_moves": 2.5}, "max_moves=2.5 is wrong"),
        ({"max_moves": True}, "max_moves=True is wrong"),
    ],
)
def test_what_makes_no_sense_is_refused(change, rule):
    given = {"load": LOAD, "current": CURRENT, "max_moves": 4} | change
    with pytest.raises(ConfigError, match=rule):
        nearby_map(given["load"], given["current"], SHAPE, given["max_moves"])


@pytest.mark.parametrize(
    "field", ["bytes_per_expert", "link_gbps", "horizon_tokens", "seconds_per_token", "top_k"]
)
@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_costs_are_above_0(field, value):
    with pytest.raises(ConfigError, match=f"{field}=.* is wrong; give a number above 0"):
        CopyCosts(**({"bytes_per_expert": 1, "link_gbps": 1, "horizon_tokens": 1} | {field: value}))
