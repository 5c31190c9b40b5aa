import torch

from tcomm.kernels.moe_layout import find_layout
from tests.kernels import virtual_tokens


def test_the_example_of_the_docstring():
    found = find_layout(torch.tensor([[3, 0], [1, -1]]), 4, 2)
    assert found.slots.tolist() == [[1, 0], [0, -1]]
    assert found.prefix.tolist() == [[0, 0], [1, 1], [2, 1]]
    assert found.num_tokens_per_expert.tolist() == [1, 1, 0, 1]


def test_places_follow_a_tokens_list_and_the_order_of_tokens():
    virtual_tokens.check_places("cpu")


def test_an_expert_out_of_range_counts_as_none():
    virtual_tokens.check_out_of_range("cpu")
