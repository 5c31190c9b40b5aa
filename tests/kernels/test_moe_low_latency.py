import pytest
import torch

from tcomm.cpu.moe_quantise import quantise
from tests.groups.moe.low_latency_cases import KINDS, Case, has_the_same_bits_twice, make, mistakes_of
from tests.groups.moe.test_low_latency import FP8
from tests.kernels.low_latency_ranks import VirtualExchange


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
    ranks = VirtualExchange(world, hidden=128 if world == 8 else 640, scaling=scaling)
    ranks.dispatch()
    rows, words = ranks.x, None
    if ranks.form.use_fp8:
        rows, words = quantise(ranks.x, round_scale=True, use_ue8m0=True)
    for rank in range(world):
        for expert in range(2):
            wanted = ranks.wanted(rank, expert)
            count = len(wanted)
            assert int(ranks.received[rank, expert]) == int(ranks.stats[rank, expert]) - 1 == count
            assert ranks.src_info[rank, expert, :count].tolist() == [token for _, token in wanted]
            assert ranks.src_info[rank, expert, count:].eq(-1).all()
            given = ranks.rows[rank, expert, :count].view(ranks.form.wire_dtype)
            for line, (source, token) in enumerate(wanted):
                assert torch.equal(given[line].view(torch.uint8), rows[source, token].view(torch.uint8))
                if words is not None:
                    assert ranks.scales[rank, expert, :, line].tolist() == words[source, token].tolist()
            counts = [sum(s == source for s, _ in wanted) for source in range(world)]
            told = [(int(r) >> 32, int(r) & 0xFFFFFFFF) for r in ranks.ranges[rank, expert]]
            assert told == [(sum(counts[:source]), counts[source]) for source in range(world)]
    assert (ranks.slots[2, 1, 2], ranks.slots[0, 0, 0]) == (-1, -1)
    assert torch.equal(ranks.slots[1, :, 0], ranks.slots[1, :, 1])
