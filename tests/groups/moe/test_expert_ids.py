import pytest
import torch

from tcomm.errors import ConfigError
from tcomm.groups.moe.expert_ids import check_divides, check_expert_ids


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        ([[0], [-2]], "token 1 has expert -2 at entry 0; experts are 0 to 3, or -1 for none"),
        ([[0, 4]], "token 0 has expert 4 at entry 1"),
        ([[3, -1], [3, 3], [5, -7]], "token 2 has expert 5 at entry 0"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_token_of_an_expert_that_is_not_there_is_named(ids, told, dtype):
    with pytest.raises(ConfigError, match=told):
        check_expert_ids(torch.tensor(ids, dtype=dtype), 4)


def test_experts_that_are_there_and_none_are_let_pass():
    check_expert_ids(torch.tensor([[-1, 0, 3]]), 4)
    check_expert_ids(torch.empty(0, 2, dtype=torch.int64), 4)


def test_every_rank_has_as_many_experts():
    for experts, world in ((0, 2), (1 << 40, 2), (5, 2), (-2, 2), (4.0, 2), (True, 1)):
        with pytest.raises(ConfigError, match=f"num_experts={experts} do not divide among {world} ranks"):
            check_divides(experts, world)
    check_divides(4, 2)
