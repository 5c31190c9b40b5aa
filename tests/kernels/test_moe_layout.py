import torch

from tcomm.kernels.moe_layout import find_layout
from tests.groups.moe.exact_moves import holders_of, make_routes


def test_the_example_of_the_docstring():
    found = find_layout(torch.tensor([[3, 0], [1, -1]]), 4, 2)
    assert found.slots.tolist() == [[1, 0], [0, -1]]
    assert found.prefix.tolist() == [[0, 0], [1, 1], [2, 1]]
    assert found.num_tokens_per_expert.tolist() == [1, 1, 0, 1]


def test_places_follow_a_tokens_list_and_the_order_of_tokens():
    for seed, world in enumerate((1, 3, 8, 16)):
        (idx,) = make_routes(seed, world, [7 * seed], min(8, 2 * world), 2 * world)
        found = find_layout(idx, 2 * world, world)
        holders = holders_of(idx, 2 * world, world)
        places = [[row.index(rank) if rank in row else -1 for rank in range(world)] for row in holders]
        assert found.slots.tolist() == places
        before = [[sum(r in row for row in holders[:t]) for r in range(world)] for t in range(len(idx) + 1)]
        assert found.prefix.tolist() == before


def test_an_expert_out_of_range_counts_as_none():
    found = find_layout(torch.tensor([[9, 1]]), 4, 2)
    assert found.slots.tolist() == [[0, -1]]
    assert found.num_tokens_per_expert.tolist() == [0, 1, 0, 0]
