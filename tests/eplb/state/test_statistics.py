import pytest
import torch

from tcomm.eplb.shapes import Shape
from tcomm.eplb.state.statistics import EplbStats, LoadStatistics, rank_loads


def test_mean_and_maximum_are_over_ranks_and_summed_over_layers():
    # Over the other axis the mean would be 8 / 3 of each rank's and the maxima 4, 2, 6.
    found = LoadStatistics.of(torch.tensor([[4, 0, 2], [0, 2, 6]]))
    assert (found.avg_tokens, found.max_tokens) == (2 + 8 / 3, 4 + 6)
    assert found.balancedness == pytest.approx((2 + 8 / 3) / 10)


def test_without_tokens_balancedness_is_0():
    assert LoadStatistics.of(torch.zeros(2, 3, dtype=torch.int64)).balancedness == 0
    assert LoadStatistics.of(torch.zeros(0, 3, dtype=torch.int64)).max_tokens == 0


def test_a_rank_knows_of_all_slots_or_of_its_own():
    load = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]], dtype=torch.int32)
    assert rank_loads(load, 2, None).tolist() == [[3, 7], [11, 15]]
    assert rank_loads(load, 3, 2).tolist() == [[0, 0, 10], [0, 0, 26]]
    assert rank_loads(load, 2, None).dtype == torch.int64


def test_numbers_of_a_plan():
    assert EplbStats(torch.zeros(2, 6), 8, 2, 2, 4).shape == Shape(6, 8, 2, 2, 4)
