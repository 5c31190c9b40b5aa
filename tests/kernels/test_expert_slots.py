import itertools

import pytest
import torch

from tcomm.kernels.expert_slots import block_constants, choose_slots
from tests.kernels import slot_choices

SIZES = list(itertools.product((0, 1, 7, 1000), (1, 3, 8), (1, 2, 61, 384)))


def test_the_example_of_the_docstring():
    slot_choices.check_example()


@pytest.mark.parametrize("seed", range(4))
def test_kernels_have_the_slots_and_counts_of_the_host(seed):
    for index, (num_tokens, topk, num_experts) in enumerate(SIZES):
        if index % 4 == seed:
            dtype, load_dtype = (torch.int64, torch.int32)[:: 1 if seed % 2 else -1]
            slot_choices.check_kernel(
                12 * seed + index, num_tokens, topk, num_experts, dtype=dtype, load_dtype=load_dtype
            )


@pytest.mark.parametrize("topk", range(1, 9))
def test_every_number_of_choices(topk):
    for num_tokens in (5, 32, 65):
        slot_choices.check_kernel(topk, num_tokens, topk, 16)


def test_what_is_no_expert_gets_none():
    slot_choices.check_out_of_range()


def test_thresholds_belong_to_the_next_replica():
    slot_choices.check_thresholds()


def test_bins_hold_every_slot_and_nothing_is_counted_without_a_counter():
    assert [block_constants(n)["BINS"] for n in (0, 1, 9, 32, 33, 288, 320)] == [0, 32, 32, 32, 64, 512, 512]


def test_kernels_need_somewhere_to_run(monkeypatch):
    from tcomm.errors import CapabilityError
    from tcomm.kernels import launch

    monkeypatch.setattr(launch, "is_interpreted", lambda: False)
    x = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(CapabilityError, match="set TRITON_INTERPRET=1"):
        choose_slots(x, x, torch.ones(1, dtype=torch.int64), None, 0, x.clone(), None)
