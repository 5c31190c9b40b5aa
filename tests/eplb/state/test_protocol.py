import re

import pytest
import torch

from tcomm.eplb.state.protocol import MixtureOfExperts, check_model, check_weights
from tcomm.errors import ConfigError
from tests.eplb.state.toy import Toy


def test_a_model_with_all_names_is_a_mixture_of_experts():
    model = Toy(num_ranks=2)
    assert isinstance(model, MixtureOfExperts)
    assert check_model(model, 2) is model
    assert not isinstance(torch.nn.Linear(1, 1), MixtureOfExperts)


def test_what_a_model_lacks_is_named():
    model = Toy(num_ranks=2)
    del model.num_expert_groups, model.expert_weights
    with pytest.raises(
        ConfigError, match="Toy is no mixture of experts: it has no expert_weights, num_expert"
    ):
        check_model(model, 2)


def test_slots_are_those_of_all_ranks_and_of_experts_with_redundant_ones():
    model = Toy(num_ranks=2)
    with pytest.raises(
        ConfigError, match="6 slots, 3 of them on this rank; 4 ranks that share them evenly have 12"
    ):
        check_model(model, 4)
    model.num_redundant_experts = 3
    with pytest.raises(ConfigError, match="6 slots, 4 experts and 3 redundant ones"):
        check_model(model, 2)


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        (
            [[torch.zeros(3, 2)]],
            "expert_weights has 1 layers where the model has 2; set_eplb_state has to collect",
        ),
        (
            [[torch.zeros(3)], [torch.zeros(3), torch.zeros(2, 5)]],
            "of layer 1 have [3, 2] rows; each needs 3",
        ),
        ([[torch.zeros(3)], []], "of layer 1 have [] rows; each needs 3"),
        ([[torch.zeros(3)], [torch.zeros(())]], "of layer 1 have [0] rows"),
        ([[torch.zeros(3)], iter([torch.zeros(3)])], "of layer 1 can be read only once; give a list"),
        ([[torch.zeros(3, 1)], [torch.zeros(3)]], "of layer 1 are float32[] in 3 slots on cpu, and those"),
        ([[torch.zeros(2, 3).T]] * 2, "is [3, 2] with strides [1, 3]; needed contiguous"),
    ],
)
def test_each_layer_has_a_row_for_each_slot(weights, complaint):
    model = Toy(num_ranks=2)
    model.expert_weights = weights
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        check_weights(model, 2, 3)
    model.expert_weights = [[torch.zeros(3)], (torch.zeros(3),)]
    check_weights(model, 2, 3)
