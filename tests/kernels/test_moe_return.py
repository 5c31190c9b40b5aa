import pytest
import torch

from tests.groups.moe.exact_moves import (
    expect_combine,
    expect_dispatch,
    make_routes,
    make_rows,
    make_weights,
)
from tests.kernels.virtual_tokens import VirtualTokens


@pytest.mark.parametrize(
    ("world", "tokens", "hidden", "dtype", "staging", "num_terms"),
    [
        (8, 2, 16, torch.float32, 1 << 18, 0),
        (2, 7, 4096, torch.bfloat16, 100 << 10, 1),
        (4, 3, 24, torch.float16, 1 << 18, 2),
    ],
)
def test_virtual_ranks_add_up_what_comes_back(world, tokens, hidden, dtype, staging, num_terms):
    """The second case goes in pieces."""
    num_experts, num_topk, counts = 2 * world, 4, [tokens] * world
    idx, weights = make_routes(1, world, counts, num_topk, num_experts), make_weights(1, counts, num_topk)
    rows = make_rows(counts, hidden, dtype)
    exchange = VirtualTokens(*map(torch.stack, (rows, idx, weights)), num_experts, "grid", staging)
    want = [expect_dispatch(rank, rows, idx, weights, num_experts) for rank in range(world)]
    exchange.dispatch(world * tokens)
    generator = torch.Generator().manual_seed(0)
    results = [torch.randn(one[1].shape, generator=generator).to(dtype) for one in want]
    given = torch.full((world, world * tokens, hidden), torch.nan, dtype=dtype)
    given_weights = torch.full((world, world * tokens, num_topk), torch.nan)
    for rank, one in enumerate(want):
        given[rank, : len(one[0])] = results[rank]
        given_weights[rank, : len(one[0])] = one[3]
    terms = [torch.stack(make_rows(counts, hidden, dtype, salt)) for salt in range(num_terms)]
    out, summed = exchange.combine(given, given_weights, terms)
    for rank in range(world):
        told = expect_combine(
            rank, idx, num_experts, results, [one[0] for one in want], [term[rank] for term in terms]
        )
        assert torch.equal(out[rank], told)
        assert torch.equal(summed[rank], weights[rank].masked_fill(idx[rank] < 0, 0))
