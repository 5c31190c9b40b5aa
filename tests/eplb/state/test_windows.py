import torch

from tcomm.eplb.state.windows import new_window, of_experts


def test_a_window_has_a_zero_for_each_step_and_slot_also_in_inference_mode():
    with torch.inference_mode():
        window = new_window(3, torch.ones(2, 4, dtype=torch.int32))
    assert window.shape == (3, 2, 4)
    assert window.dtype == torch.int32
    assert not window.any()
    assert not window.is_inference()


def test_what_slots_had_is_told_of_experts_and_empty_slots_of_nobody():
    window = torch.tensor([[[1, 2, 3, 9]], [[10, 20, 30, 9]]], dtype=torch.int32)
    assert of_experts(window, torch.tensor([[2, 0, 2, -1]]), 4).tolist() == [[22, 0, 44, 0]]


def test_a_sum_over_steps_does_not_overflow():
    window = torch.full((3, 1, 1), 2**31 - 1, dtype=torch.int32)
    assert of_experts(window, torch.tensor([[0]]), 1).tolist() == [[3 * (2**31 - 1)]]
