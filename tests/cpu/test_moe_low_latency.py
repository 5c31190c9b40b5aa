import torch

from tcomm.cpu.moe_low_latency import (
    add_weighted,
    as_words,
    find_rows,
    make_plan,
    mark,
    numbers_of,
    pack_ranges,
)


def test_copies_are_ordered_by_destination_expert_and_token():
    plan = make_plan(torch.tensor([[0, 3], [1, -1], [0, 2]]), 4, 2)
    assert plan.tokens.tolist() == [0, 2, 1, 2, 0]
    assert plan.counts.tolist() == [[2, 1], [1, 1]]
    assert plan.starts == [0, 3, 5]
    assert plan.owners.tolist() == [[0, 1], [0, -1], [0, 1]]
    assert plan.slots.tolist() == [[0, 1], [2, -1], [1, 0]]


def test_a_token_that_names_an_expert_twice_gives_one_copy():
    plan = make_plan(torch.tensor([[1, 1, 0]]), 2, 1)
    assert plan.tokens.tolist() == [0, 0]
    assert plan.slots.tolist() == [[1, 1, 0]]


def test_a_rank_without_tokens_has_a_plan():
    plan = make_plan(torch.zeros(0, 3, dtype=torch.int64), 4, 2)
    assert (plan.tokens.tolist(), plan.starts, plan.slots.shape) == ([], [0, 0, 0], (0, 3))


def test_rows_follow_experts_and_sources():
    counts = torch.tensor([[1, 2], [2, 0]])
    begins, rows = find_rows(counts, 8)
    assert begins.tolist() == [[0, 1], [0, 2]]
    assert [one.tolist() for one in rows] == [[0, 8, 9], [1, 2]]
    ranges = pack_ranges(begins, counts)
    assert ranges.tolist() == [[1, 1 << 32 | 2], [2, 2 << 32]]


def test_words_carry_their_epoch_also_past_the_sign():
    numbers = torch.tensor([0, 5, (1 << 31) + 7])
    for epoch in (3, (1 << 31) + 3, (1 << 32) - 1):
        words = mark(numbers, epoch)
        told, is_fresh = numbers_of(words, epoch)
        assert told.tolist() == numbers.tolist()
        assert is_fresh.all()
        assert not numbers_of(words, epoch ^ 1)[1].any()
        words[1] = 5
        assert numbers_of(words, epoch)[1].tolist() == [True, False, True]


def test_weighted_rows_are_added_where_they_were_chosen():
    rows = torch.tensor([[1.0] * 4, [2.0] * 4, [float("nan")] * 4])
    acc = torch.ones(3, 4)
    add_weighted(
        acc, rows, torch.tensor([1, 2, 0]), torch.tensor([0.5, 9.0, 3.0]), torch.tensor([True, False, True])
    )
    assert acc[:, 0].tolist() == [2.0, 1.0, 4.0]
    add_weighted(acc, rows, torch.tensor([1, 1, 0]), torch.ones(3), torch.tensor([True] * 3))
    assert acc[:, 3].tolist() == [4.0, 3.0, 5.0]
    add_weighted(acc, rows, torch.tensor([2, 2, 2]), torch.ones(3), torch.tensor([False] * 3))
    assert acc[:, 3].tolist() == [4.0, 3.0, 5.0]


def test_words_of_rows_are_the_rows():
    rows = torch.zeros(2, 8, dtype=torch.bfloat16)
    as_words(rows)[1, 1] = -1
    assert rows.isnan().nonzero().tolist() == [[1, 4], [1, 5], [1, 6], [1, 7]]
