import pytest
import torch

from tcomm.errors import ConfigError
from tcomm.groups.moe.routing import Routing, check_topk, check_topk_shape, make_layout
from tests.groups.moe.exact_moves import holders_of, make_routes


@pytest.mark.parametrize("engine", ["cpu", "triton"])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_a_layout_counts_tokens_by_rank_and_by_expert(engine, world):
    num_experts = 3 * world
    kinds = ("random", "one", "not_first", "none")
    tokens = [9, 0, 4, 1]
    for kind, num_topk in zip(kinds, (3, 1, 2, 3), strict=True):
        for idx in make_routes(num_topk, world, tokens, num_topk, num_experts, kind):
            layout = make_layout(idx, num_experts, world, engine)
            holders = holders_of(idx, num_experts, world)
            in_rank = [[rank in found for rank in range(world)] for found in holders]
            assert layout.is_token_in_rank.tolist() == in_rank
            assert layout.num_tokens_per_rank.tolist() == [
                sum(row[r] for row in in_rank) for r in range(world)
            ]
            assert layout.num_tokens_per_expert.tolist() == [
                int((idx == e).sum()) for e in range(num_experts)
            ]
            dtypes = [layout.num_tokens_per_rank.dtype, layout.num_tokens_per_expert.dtype]
            assert [*dtypes, layout.is_token_in_rank.dtype] == [torch.int32, torch.int32, torch.bool]


def test_the_small_example():
    layout = make_layout(torch.tensor([[0, 3], [1, -1]]), 4, 2)
    assert layout.num_tokens_per_rank.tolist() == [2, 1]
    assert layout.num_tokens_per_expert.tolist() == [1, 1, 0, 1]
    assert layout.is_token_in_rank.tolist() == [[True, True], [True, False]]


def test_choices_that_cannot_be_meant_are_refused():
    idx = torch.tensor([[0, 1], [7, -1], [-2, 0]])
    with pytest.raises(ConfigError, match=r"token 1 has expert 7 at entry 0"):
        check_topk(idx, 4)
    with pytest.raises(ConfigError, match="token 2 has expert -2"):
        make_layout(idx, 8, 2)
    for wrong in (idx[0], idx.int(), [[0]], torch.zeros(1, 0).long(), torch.zeros(1, 33).long()):
        with pytest.raises(ConfigError, match="topk_idx"):
            check_topk_shape(wrong, 4, 2)
    with pytest.raises(ConfigError, match="topk_idx is on meta"):
        make_layout(idx.to("meta"), 8, 2)
    for experts, world in ((3, 2), (0, 1), (4.0, 2)):
        with pytest.raises(ConfigError, match="num_experts"):
            check_topk_shape(idx, experts, world)
    check_topk(idx.clamp(-1, 3), 4, 2)


def test_a_routing_unpacks_like_a_handle():
    """Rank 1 of 2, which sends tokens 0 and 2 to rank 0 and token 0 to itself, behind rank 0."""
    slots = torch.tensor([[0, 1], [-1, -1], [0, -1]])
    counts = [[1, 2], [2, 1]]
    routing = Routing(
        1, slots, torch.tensor([1, 5, 1]), torch.tensor(counts, dtype=torch.int32), counts, 3, 4, 8
    )
    found = [one.tolist() for one in routing]
    assert found == [
        [[1, 2], [3, 3]], [[2], [1]], [[0], [0]], [0, 2, 0], [[True, True], [False, False], [True, False]],
        [[0, 0], [-1, -1], [1, -1]],
    ]  # fmt: skip
    assert [one.dtype for one in routing] == [*[torch.int32] * 4, torch.bool, torch.int32]
    assert len(routing) == 6
    assert routing[5].tolist() == found[5]
    assert routing.prefix.tolist() == [[0, 0], [1, 1], [1, 1], [2, 1]]
    assert routing.num_places.tolist() == [2, 0, 1]
    assert (routing.num_tokens, routing.num_rows, routing.width) == (3, 3, 2)
    assert [routing.rows_of(source) for source in (0, 1)] == [slice(0, 2), slice(2, 3)]
