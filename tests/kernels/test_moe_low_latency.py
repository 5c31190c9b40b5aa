import pytest
import torch

from tests.groups.moe.low_latency_cases import KINDS, Case, make, mistakes_of, run_case
from tests.groups.moe.test_low_latency import FP8


def _identities(member, dtype, hidden, number):
    exchange = make(member, engine="triton", dtype=dtype, hidden=hidden)
    found = []
    for seed in range(number):
        found += mistakes_of(
            exchange,
            Case(
                seed, 1 + 3 * seed % 8, KINDS[seed % len(KINDS)], FP8[seed % 4], seed % 3 == 0, seed % 2 == 1
            ),
        )
    twice = [run_case(exchange, Case(3, 4)) for _ in range(2)]
    exchange.close()
    return found, all(
        torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(*twice, strict=True)
    )


@pytest.mark.parametrize(
    ("world", "dtype", "hidden", "number"),
    [(2, torch.bfloat16, 640, 8), (4, torch.float32, 128, 5), (1, torch.float16, 128, 3)],
)
def test_kernels_do_what_the_definition_says(on_ranks, world, dtype, hidden, number):
    assert on_ranks(world, _identities, dtype, hidden, number) == [([], True)] * world
