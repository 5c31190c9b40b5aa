import pytest
import torch

from tcomm.errors import UsageError
from tcomm.groups.all2all.placement import determine_expert_map


def test_a_single_rank_has_all():
    assert determine_expert_map(1, 0, 7) == (7, None, None)
    assert determine_expert_map(1, 0, 7, "nonsense", 2, True) == (7, None, None)


@pytest.mark.parametrize(
    ("strategy", "wanted"),
    [
        ("linear", [(2, [0, 1, -1, -1, -1]), (2, [-1, -1, 0, 1, -1]), (1, [-1, -1, -1, -1, 0])]),
        ("round_robin", [(2, [0, -1, -1, 1, -1]), (2, [-1, 0, -1, -1, 1]), (1, [-1, -1, 0, -1, -1])]),
    ],
)
def test_the_first_ranks_have_one_more(strategy, wanted):
    for rank, (number, places) in enumerate(wanted):
        found = determine_expert_map(3, rank, 5, strategy)
        assert (found[0], found[1].tolist(), found[2]) == (number, places, None)
        assert found[1].dtype == torch.int32


@pytest.mark.parametrize("strategy", ["linear", "round_robin"])
@pytest.mark.parametrize(("ranks", "experts"), [(2, 8), (3, 8), (4, 3), (2, 0)])
def test_every_expert_is_on_one_rank(strategy, ranks, experts):
    found = [determine_expert_map(ranks, rank, experts, strategy) for rank in range(ranks)]
    assert sum(number for number, _, _ in found) == experts
    maps = torch.stack([places for _, places, _ in found])
    assert maps.ge(0).sum(0).eq(1).all()
    for number, places, _ in found:
        assert places[places >= 0].tolist() == list(range(number))


def test_a_mask_and_shared_experts():
    number, places, mask = determine_expert_map(2, 1, 5, "linear", 2, True)
    assert (number, places.tolist(), mask.tolist()) == (
        2,
        [-1, -1, -1, 0, 1, 2, 3],
        [0, 0, 0, 1, 1, 1, 1, 0],
    )
    assert (places.dtype, mask.dtype) == (torch.int32, torch.int32)
    assert determine_expert_map(2, 0, 2, return_expert_mask=True)[2].tolist() == [1, 0, 0]
    assert determine_expert_map(2, 1, 5, num_fused_shared_experts=2)[1].tolist() == [-1, -1, -1, 0, 1]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ((0, 0, 4), "ep_size is 1 or more"),
        ((2, 2, 4), "rank 2 of 2 ranks"),
        ((2, -1, 4), "rank -1 of 2"),
        ((2, 0, -1), "-1 routed and 0 shared"),
        ((2, 0, 4, "linear", -1), "4 routed and -1 shared"),
        ((2, 0, 4, "random"), "Unsupported expert placement strategy 'random', expected one of"),
    ],
)
def test_what_makes_no_sense_is_refused(args, told):
    with pytest.raises(UsageError, match=told) as caught:
        determine_expert_map(*args)
    assert isinstance(caught.value, ValueError)
