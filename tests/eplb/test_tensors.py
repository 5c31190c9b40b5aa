import numpy as np
import pytest
import torch

from tcomm.eplb.shapes import Shape
from tcomm.eplb.tensors import compute_logical_maps, load_of, rebalance_experts, shape_of
from tcomm.errors import ConfigError
from tests.eplb.worlds import GOLDEN_COUNTS, GOLDEN_LOAD, GOLDEN_MAP, GOLDEN_SHAPE, assert_valid


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.int32, torch.int64, torch.bfloat16, torch.uint8]
)
def test_the_known_plan_from_any_dtype(dtype):
    maps = rebalance_experts(torch.tensor(GOLDEN_LOAD).to(dtype), 16, 4, 2, 8)
    assert all(part.dtype == torch.int64 and part.device.type == "cpu" for part in maps)
    phy2log, log2phy, logcnt = maps
    assert phy2log.tolist() == GOLDEN_MAP
    assert log2phy.shape == (2, 12, 5)
    assert logcnt.tolist() == GOLDEN_COUNTS
    assert_valid(*(part.numpy() for part in maps), GOLDEN_SHAPE)


def test_a_load_leaves_its_graph_and_keeps_its_values():
    load = torch.tensor([[1.5, 2]], requires_grad=True)
    assert load_of(load).tolist() == [[1.5, 2]]
    assert load_of(torch.tensor([[3]], dtype=torch.bfloat16)).dtype == np.float32
    for wrong in ([[1.0]], torch.ones(1, 1, dtype=torch.complex64)):
        with pytest.raises(ConfigError, match="give a real tensor"):
            load_of(wrong)


def test_the_shape_takes_the_experts_from_the_load():
    assert shape_of(np.ones((2, 12)), 16, 4, 2, 8) == Shape(12, 16, 4, 2, 8)
    with pytest.raises(ConfigError, match=r"a load of shape \[3\] is wrong"):
        shape_of(np.ones(3), 16, 4, 2, 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_loads_that_are_none_are_refused(value):
    with pytest.raises(ConfigError, match=f"expert 1 in layer 0 is {value}"):
        rebalance_experts(torch.tensor([[1.0, value]]), 2, 1, 1, 1)


def test_one_expert_with_everything_and_no_load_at_all_are_planned():
    for load in (torch.tensor([[0.0, 5, 0, 0]]), torch.zeros(1, 4)):
        maps = rebalance_experts(load, 8, 2, 2, 4)
        assert_valid(*(part.numpy() for part in maps), Shape(4, 8, 2, 2, 4))
    assert rebalance_experts(torch.tensor([[0.0, 5, 0, 0]]), 8, 1, 1, 4)[2].tolist() == [[1, 5, 1, 1]]


def test_logical_maps_of_tensors():
    phy2log = torch.tensor([[0, 1, 1, -1], [1, 0, 1, 1]], dtype=torch.int32)
    log2phy, counts = compute_logical_maps(phy2log, 2)
    assert log2phy.tolist() == [[[0, -1, -1], [1, 2, -1]], [[1, -1, -1], [0, 2, 3]]]
    assert counts.tolist() == [[1, 2], [1, 3]]
    assert log2phy.dtype == counts.dtype == torch.int64
    flat, few = compute_logical_maps(phy2log[0], 2)
    assert (flat.tolist(), few.tolist()) == ([[0, -1], [1, 2]], [1, 2])


@pytest.mark.parametrize(
    ("phy2log", "rule"),
    [
        (torch.zeros(1, 2), r"phy2log is torch.float32 \[1, 2\]; give integers"),
        (torch.zeros(1, 2, 2, dtype=torch.int64), "give integers"),
        (torch.tensor([0, 2]), "phy2log names expert 2; give -1 to 1"),
        (torch.tensor([0, -2]), "phy2log names expert -2"),
    ],
)
def test_maps_that_are_none_are_refused(phy2log, rule):
    with pytest.raises(ConfigError, match=rule):
        compute_logical_maps(phy2log, 2)
