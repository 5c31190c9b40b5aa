import functools

import pytest
import torch

from tcomm.cpu.moe_high_throughput import (
    Given,
    Head,
    as_words,
    gather,
    read_head,
    return_rows,
    stage,
    sum_rows,
)
from tcomm.errors import DecodeError
from tcomm.memory.token_regions import DispatchRegions, ReturnRegions

HALF = 4096


@pytest.fixture
def view():
    halves = torch.zeros(2, HALF, dtype=torch.uint8)

    def look(rank, offset, shape, dtype):
        numel = functools.reduce(int.__mul__, shape, 1)
        return halves[rank, offset : offset + numel * dtype.itemsize].view(dtype).view(shape)

    return look


def test_words_of_rows_that_begin_anywhere():
    x = torch.arange(9, dtype=torch.float32)
    assert as_words(x[1:].view(2, 4)).view(torch.float32).tolist() == x[1:].view(2, 4).tolist()
    assert as_words(x[:8].view(2, 4)).data_ptr() == x.data_ptr()


def _given():
    rows = torch.arange(6).view(3, 2)
    facts = [torch.tensor([[4], [5], [6]]), torch.tensor([[0.5], [1.5], [2.5]])]
    lists = [torch.tensor(entries, dtype=torch.int32) for entries in ([0, 4], [1, 2])]
    return Given(rows, facts, lists, 2)


@pytest.mark.parametrize("epoch", [3, (1 << 32) - 1])
def test_what_is_staged_is_fetched(view, epoch):
    regions, given = DispatchRegions(HALF, 2, 16, 2), _given()
    stage(view, regions, 0, epoch, 0, given)
    head = read_head(view, regions, 0, epoch)
    assert head == Head([2, 2], [2, 2], 3)
    for rank, tokens in ((0, [0, 2]), (1, [0, 1])):
        rows, facts = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int32)
        row_slots = torch.zeros(2, dtype=torch.int64)
        gather(view, regions, 0, rank, 0, head, given, (rows, facts, row_slots))
        assert torch.equal(rows, given.rows[tokens])
        assert facts[:, 0].tolist() == [4 + token for token in tokens]
        assert facts[:, 1:].contiguous().view(torch.float32).tolist() == [[token + 0.5] for token in tokens]
        assert row_slots.tolist() == given.lists[rank].tolist()
    with pytest.raises(DecodeError, match=r"rank 0 gave counts \[.*\] that are not of epoch"):
        read_head(view, regions, 0, epoch - 1)


def test_a_piece_has_its_part_of_each_list():
    given = _given()
    assert [given.piece(0, first, first + 1).tolist() for first in range(4)] == [[0], [], [4], []]
    assert [given.piece(1, 0, last).tolist() for last in (1, 2, 3)] == [[1], [1, 2], [1, 2]]


def test_rows_return_to_their_places_and_are_added_up_in_order(view):
    regions = ReturnRegions(1024, 2, 16, 1)
    rows, weights = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([[0.5], [0.25]])
    far = 2 * regions.num_tokens
    for row_slots, first, count in (
        ([1, far], 0, 1),
        ([1, far], regions.num_tokens, 1),
        ([0, 3], 0, 2),
        ([], 0, 0),
    ):
        found = torch.tensor(row_slots, dtype=torch.int64)
        words = rows.view(torch.int64)[: len(found)]
        assert return_rows(view, regions, 1, first, found, words, weights[: len(found)]) == count
    # Slot 1 is of the first call, slot 0 of the third, which took the place of the second's.
    held = view(1, 0, (2, 2, 4), torch.float32)
    assert held.tolist() == [[[1, 2, 3, 4], [1, 2, 3, 4]], [[0] * 4, [5, 6, 7, 8]]]
    assert view(1, regions.weights_offset, (4,), torch.float32).tolist() == [0.5, 0.5, 0, 0.25]
    out = torch.full((2, 4), torch.nan)
    sum_rows(held, torch.tensor([2, 0]), [torch.ones(2, 4)], out)
    assert out.tolist() == [[3, 5, 7, 9], [1, 1, 1, 1]]


def test_sums_are_float32_in_the_order_of_places():
    places = torch.tensor([[[256.0], [1.0], [1.0]], [[256.0], [-256.0], [0.5]]]).bfloat16().repeat(1, 1, 8)
    places = places.repeat(20, 1, 4096)  # several blocks
    out = torch.empty(40, 8 * 4096, dtype=torch.bfloat16)
    sum_rows(places, torch.full((40,), 3), [], out)
    assert out[0::2].eq(258).all()
    assert out[1::2].eq(0.5).all()
