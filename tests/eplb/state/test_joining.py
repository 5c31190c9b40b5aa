import pytest
import torch

from tcomm.eplb.state.joining import Joining, build_initial_global_physical_to_logical_map
from tcomm.errors import ConfigError
from tests.eplb.state.toy import Toy

LOAD = torch.ones(2, 4, dtype=torch.int64)
OLD = torch.tensor([[0, 1, 2, 3, -1, 1]] * 2)


def test_redundant_slots_begin_again_with_the_first_expert():
    assert build_initial_global_physical_to_logical_map(3, 5) == [0, 1, 2, 0, 1, 2, 0, 1]


def test_who_does_not_join_begins_with_the_first_map():
    assert Joining(None, None, None).first_map(Toy(num_ranks=2)).tolist() == [[0, 1, 2, 3, 0, 1]] * 2


def test_who_joins_begins_with_the_map_of_the_others():
    model = Toy(num_ranks=3, redundant=5)
    assert Joining(LOAD, OLD, {0: 0, 1: 1}).first_map(model).tolist() == OLD.tolist()
    assert Joining(LOAD, OLD, None).first_map(Toy(num_ranks=2)).tolist() == OLD.tolist()


@pytest.mark.parametrize(
    ("joining", "said"),
    [
        (Joining(None, OLD, None), "go with a global_expert_load; give that too"),
        (Joining(None, None, {0: 0}), "go with a global_expert_load"),
        (Joining(LOAD, None, {0: 0}), "goes with old_global_expert_indices; give that map too"),
        (Joining(LOAD, OLD, {0: 0, 1: 1, 2: 2}), r"is int64 \[2, 6\]; give integers \[2, 9\]"),
    ],
)
def test_what_is_missing_is_said(joining, said):
    with pytest.raises(ConfigError, match=said):
        joining.first_map(Toy(num_ranks=2))
