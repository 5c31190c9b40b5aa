import pytest
import torch

from tests.groups.moe.exact_moves import expect_dispatch, make_routes, make_rows, make_weights
from tests.kernels.virtual_tokens import VirtualTokens


@pytest.mark.parametrize(
    ("world", "tokens", "hidden", "mode", "staging"),
    [(8, 3, 16, "grid", 1 << 18), (2, 7, 4096, "streams", 100 << 10), (3, 0, 8, "grid", 1 << 18)],
)
def test_virtual_ranks_get_the_rows_that_are_theirs(world, tokens, hidden, mode, staging):
    """The second case goes in pieces."""
    num_experts, num_topk = 4 * world, 3
    counts = [tokens] * world
    idx, weights = make_routes(2, world, counts, num_topk, num_experts), make_weights(2, counts, num_topk)
    rows = make_rows(counts, hidden, torch.bfloat16)
    exchange = VirtualTokens(*map(torch.stack, (rows, idx, weights)), num_experts, mode, staging)
    want = [expect_dispatch(rank, rows, idx, weights, num_experts) for rank in range(world)]
    room = max(len(one[0]) for one in want) + 1
    got, ids, told = exchange.dispatch(room)
    for rank, (come, x, local, weight, _) in enumerate(want):
        here = slice(0, len(come))
        assert torch.equal(got[rank][here], x)
        found = ids[rank][here] - rank * 4
        away = (found < 0) | (found >= 4)
        assert torch.equal(found.masked_fill(away, -1), local.int())
        assert torch.equal(told[rank][here].masked_fill(away, 0), weight)
        sources = exchange.row_slots[rank].div(exchange.width, rounding_mode="floor")
        assert sources.tolist() == [token for _, token in come] + [-1] * (room - len(come))
        sent = [[sum(s == source for s, _ in one[0]) for one in want] for source in range(world)]
        assert exchange.matrix[rank].tolist() == sent
        assert exchange.heads[rank, :, -1].tolist() == counts


def test_rows_beyond_the_room_are_left_out():
    counts, rows = [4, 4], make_rows([4, 4], 8, torch.float32)
    idx, weights = make_routes(0, 2, counts, 1, 4, "one"), make_weights(0, counts, 1)
    exchange = VirtualTokens(*map(torch.stack, (rows, idx, weights)), 4)
    got, _, _ = exchange.dispatch(5)
    assert torch.equal(got[1], torch.cat(rows)[:5])
    assert got[0].eq(0).all()
