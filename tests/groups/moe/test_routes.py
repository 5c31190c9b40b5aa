import pytest
import torch

from tcomm.errors import ConfigError
from tcomm.groups.moe.routes import as_word_rows, make_routes
from tests.groups.moe.routings import destinations, ids_of


def test_the_example_of_the_docstring():
    routes = make_routes(torch.tensor([[3, 2], [0, 3], [-1, 1]]), 4, 2)
    assert routes.ranks.tolist() == [[1, -1], [0, 1], [-1, 0]]
    assert routes.slots.tolist() == [[0, -1], [0, 1], [-1, 1]]
    assert routes.counts.tolist() == [2, 2]
    assert routes.tables == (routes.ranks, routes.slots, routes.counts)
    assert [routes.num_remote(rank) for rank in range(2)] == [2, 2]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_copies_are_those_of_a_loop_over_tokens(world, top_k):
    for num_tokens in (0, 1, 50):
        ids = ids_of("random", num_tokens, 1, num_tokens, top_k)
        routes, sent = make_routes(ids.to(torch.int32), 24, world), [0] * world
        for t, ranks in enumerate(destinations(ids, world)):
            assert [r for r in routes.ranks[t].tolist() if r >= 0] == ranks
            assert [s for s in routes.slots[t].tolist() if s >= 0] == [sent[r] for r in ranks]
            for rank in ranks:
                sent[rank] += 1
        assert routes.counts.tolist() == sent


def test_what_is_no_routing_is_refused():
    with pytest.raises(ConfigError, match="token 1 has expert -2 at entry 0"):
        make_routes(torch.tensor([[0], [-2]]), 4, 2)
    with pytest.raises(ConfigError, match="token 0 has expert 4 at entry 1; experts are 0 to 3"):
        make_routes(torch.tensor([[0, 4]]), 4, 2)
    with pytest.raises(ConfigError, match="needed int32 or int64"):
        make_routes(torch.tensor([0]), 4, 2)


@pytest.mark.parametrize(
    ("dtype", "tail", "words", "wide"),
    [
        (torch.bfloat16, (4,), 1, torch.int64), (torch.float32, (3,), 3, torch.int32),
        (torch.uint8, (2, 3), 3, torch.int16), (torch.uint8, (7,), 7, torch.uint8),
        (torch.bool, (4,), 1, torch.int32), (torch.float8_e4m3fn, (8,), 1, torch.int64),
        (torch.float64, (), 1, torch.int64), (torch.float32, (0,), 0, torch.uint8),
    ],
)  # fmt: skip
def test_rows_are_seen_as_the_widest_words(dtype, tail, words, wide):
    x = torch.zeros(5, *tail).to(dtype)
    rows = as_word_rows(x)
    assert rows.shape == (5, words)
    assert rows.dtype == wide
    assert not words or rows.data_ptr() == x.data_ptr()
    assert as_word_rows(x[:0]).shape == (0, words)


def test_rows_at_an_odd_address_are_copied():
    x = torch.arange(33, dtype=torch.uint8)[1:].view(4, 8)
    rows = as_word_rows(x)
    assert rows.data_ptr() % 16 == 0
    assert rows.view(torch.uint8).tolist() == x.tolist()
