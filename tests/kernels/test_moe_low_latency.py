import pytest
import torch

from tests.groups.moe.low_latency_cases import KINDS, Case, has_the_same_bits_twice, make, mistakes_of
from tests.groups.moe.test_low_latency import FP8
from tests.kernels.low_latency_ranks import check_dispatch, check_masked, check_missing_rank


def _identities(member, dtype, hidden, number):
    exchange = make(member, engine="triton", dtype=dtype, hidden=hidden, num_max_tokens=4, num_experts=4)
    found = []
    for seed in range(number):
        kind, fp8 = KINDS[(3 * seed + 1) % len(KINDS)], FP8[-seed % 4]
        found += mistakes_of(exchange, Case(seed, 1 + seed % 4, kind, fp8, seed % 2 == 0, seed % 2 == 1))
    same = has_the_same_bits_twice(exchange, Case(3, 4))
    exchange.close()
    return found, same


@pytest.mark.parametrize(
    ("world", "dtype", "hidden", "number"), [(2, torch.bfloat16, 640, 6), (4, torch.float32, 128, 2)]
)
def test_kernels_do_what_the_definition_says(on_ranks, world, dtype, hidden, number):
    assert on_ranks(world, _identities, dtype, hidden, number) == [([], True)] * world


@pytest.mark.parametrize(("world", "scaling"), [(8, (False, False, False)), (3, (True, True, True))])
def test_virtual_ranks_dispatch(world, scaling):
    check_dispatch(world, hidden=128 if world == 8 else 640, scaling=scaling)


@pytest.mark.parametrize(
    ("world", "masked", "options"),
    [(3, (1,), {"scaling": (True, False, False)}), (4, (0, 3), {"lends": True}), (2, (0,), {})],
)
def test_ranks_that_are_left_out_get_nothing_and_give_nothing(world, masked, options):
    check_masked(world, masked, **options)


def test_a_virtual_rank_that_never_comes_is_named():
    check_missing_rank(3, 1, timeout=0.3)
