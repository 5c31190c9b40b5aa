import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tcomm.cpu.expert_slots import choose_slots, count_slots
from tcomm.memory.expert_slots import CHOICES_A_BLOCK, GOLDEN, SlotCounter
from tests.kernels.slot_choices import EXAMPLE, random_routing


def _chosen(routing, salt=0, share=None):
    out = torch.empty_like(routing.topk)
    choose_slots(routing.topk, routing.slots, routing.count, share, salt, out)
    return out


def _in_loops(routing, salt):
    """The meaning, a choice at a time."""
    seen, found = {}, []
    for index, expert in enumerate(routing.topk.reshape(-1).tolist()):
        block = index // CHOICES_A_BLOCK
        number = seen[block, expert] = seen.get((block, expert), -1) + 1
        count = int(routing.count[expert]) if expert >= 0 else 0
        h = number + block + expert + salt
        place = h % max(count, 1)
        if routing.share is not None:
            place = next(
                x for x in range(routing.slots.shape[1]) if h * GOLDEN % 65536 < routing.share[expert, x]
            )
        found.append(int(routing.slots[expert, place]) if count else -1)
    return torch.tensor(found).view(routing.topk.shape)


def test_the_examples_of_the_docstrings():
    out = torch.empty(3, 2, dtype=torch.int64)
    choose_slots(*(torch.tensor(EXAMPLE[name]) for name in ("topk", "map", "count")), None, 0, out)
    assert out.tolist() == EXAMPLE["out"]
    load = torch.tensor([5, 5], dtype=torch.int32)
    count_slots(out, SlotCounter(load, 2, None, None))
    assert load.tolist() == [6, 6]
    count_slots(out, SlotCounter(load, 2, 1, None))
    assert load.tolist() == [6, 6]


@pytest.mark.parametrize("shares", [False, True])
def test_slots_are_those_of_the_meaning(shares):
    for seed, num_tokens in enumerate((1, 40, 300)):
        routing = random_routing(seed, num_tokens, 3, 17, shares=shares)
        routing.topk[routing.count[routing.topk.clamp(min=0)] == 0] = -1
        assert torch.equal(_chosen(routing, seed, routing.share), _in_loops(routing, seed))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0, 1, 7, 100, 700]),
    st.integers(1, 8),
    st.integers(1, 384),
    st.booleans(),
    st.sampled_from([torch.int64, torch.int32]),
)
def test_choices_land_on_slots_of_their_expert_and_are_counted(
    seed, num_tokens, topk, num_experts, shares, dtype
):
    routing = random_routing(seed, num_tokens, topk, num_experts, dtype=dtype, shares=shares)
    out = _chosen(routing, seed % 50, routing.share)
    assert out.dtype == dtype
    idx = routing.topk.long()
    is_routed = (idx >= 0) & (routing.count[idx.clamp(min=0)] > 0)
    of_expert = routing.slots[idx.clamp(min=0)] == out.long()[..., None]
    assert torch.equal(of_expert.any(-1) & (out >= 0), is_routed)
    assert bool((out[~is_routed] == -1).all())
    load = torch.full((routing.num_slots,), 2, dtype=torch.int32)
    count_slots(out, SlotCounter(load, 0, None, None))
    assert np.array_equal(load - 2, np.bincount(out[out >= 0].reshape(-1), minlength=routing.num_slots))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 900), st.integers(1, 8), st.integers(1, 40), st.integers(0, 99))
def test_replicas_differ_by_one_choice_a_block_at_most(seed, num_tokens, topk, num_experts, salt):
    routing = random_routing(seed, num_tokens, topk, num_experts)
    load = np.bincount(_chosen(routing, salt).reshape(-1) + 1, minlength=routing.num_slots + 1)[1:]
    blocks = -(-num_tokens * topk // CHOICES_A_BLOCK)
    for slots, count in zip(routing.slots, routing.count.tolist(), strict=True):
        if count:
            loads = load[slots[:count]]
            assert loads.max() - loads.min() <= blocks


@pytest.mark.parametrize("count", [2, 3, 4, 8])
@pytest.mark.parametrize("every", [1, 2, 4, 8])
def test_tokens_that_all_choose_the_same_are_shared_evenly(count, every):
    """The index of a choice or a token, modulo the replicas, would send all of them to one."""
    topk = torch.full((512, 8), -1)
    topk[::every] = torch.arange(8)
    slots = torch.arange(8 * count).view(8, count)
    out = torch.empty_like(topk)
    choose_slots(topk, slots, torch.full((8,), count), None, 0, out)
    loads = np.bincount(out[out >= 0], minlength=8 * count).reshape(8, count)
    assert (loads.max(axis=1) - loads.min(axis=1)).max() <= 2


def test_ranks_with_a_choice_each_begin_at_different_replicas():
    topk, slots, count = torch.tensor([[0]]), torch.tensor([[4, 5, 6]]), torch.tensor([3])
    out = torch.empty_like(topk)
    found = []
    for rank in range(6):
        choose_slots(topk, slots, count, None, rank, out)
        found.append(int(out))
    assert found == [4, 5, 6] * 2


def test_shares_are_kept_to():
    topk = torch.zeros(1000, 1, dtype=torch.int64)
    share = torch.tensor([[6554, 6554, 65536, 65536]], dtype=torch.int32)
    out = torch.empty_like(topk)
    choose_slots(topk, torch.tensor([[3, 1, 2, -1]]), torch.tensor([3]), share, 0, out)
    loads = np.bincount(out.reshape(-1), minlength=4)
    assert loads[1] == 0
    assert abs(loads - [0, 0, 900, 100]).max() <= 4


def test_only_what_is_to_be_counted_is():
    slots = torch.tensor([[0, 5], [3, -1], [2, 3]], dtype=torch.int32)
    for unpadded, record, wanted in (
        (None, None, [1, 2]),
        (2, torch.tensor([True]), [0, 1]),
        (torch.tensor(2), torch.tensor(True), [0, 1]),
        (9, None, [1, 2]),
        (0, None, [0, 0]),
        (torch.tensor([-1]), None, [0, 0]),
        (None, torch.tensor(False), [0, 0]),
    ):
        load = torch.zeros(2, dtype=torch.int64)
        count_slots(slots, SlotCounter(load, 2, unpadded, record))
        assert load.tolist() == wanted, (unpadded, record)
