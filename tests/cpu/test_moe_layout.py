import torch

from tcomm.cpu.moe_layout import count_experts, find_holders, find_slots, list_slots


def test_the_examples_of_the_docstrings():
    slots = find_slots(torch.tensor([[2, 0, 2], [-1, 1, -1]]), 3)
    assert slots.tolist() == [[1, -1, 0], [-1, 0, -1]]
    assert [entries.tolist() for entries in list_slots(slots, 2)] == [[1], [2], [0]]
    assert {entries.dtype for entries in list_slots(slots, 2)} == {torch.int32}


def test_experts_are_shared_evenly_and_counted():
    idx = torch.tensor([[0, 5], [-1, 3], [3, -1]])
    assert find_holders(idx, 6, 3).tolist() == [[0, 2], [-1, 1], [1, -1]]
    assert count_experts(idx, 6).tolist() == [1, 0, 0, 2, 0, 1]
    assert count_experts(idx[:0], 6).tolist() == [0] * 6
