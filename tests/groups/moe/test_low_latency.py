import functools
import gc
import time

import pytest
import torch

from tcomm.errors import CollectiveMismatchError, ConfigError, GroupClosedError, PeerLostError, UsageError
from tcomm.groups.moe import low_latency
from tests.groups.moe.low_latency_cases import (
    KINDS,
    Case,
    has_the_same_bits_twice,
    make,
    mistakes_of,
    tokens_of,
    wire_nbytes_of,
)

FP8 = ((), ("use_fp8",), ("use_fp8", "round_scale"), ("use_fp8", "round_scale", "use_ue8m0"))


def cases():
    """Alternating kinds, formats and ways, for one exchange."""
    return [
        Case(seed, 1 + seed % 8, KINDS[seed % len(KINDS)], FP8[seed % 4], seed % 3 == 0, seed % 2 == 1)
        for seed in range(24)
    ]


def _identities(member, dtype, hidden):
    exchange = make(member, dtype=dtype, hidden=hidden)
    found = []
    for case in cases():
        time.sleep(0.002 * ((case.seed + member.rank) % 3))
        found += mistakes_of(exchange, case)
    same = has_the_same_bits_twice(exchange, cases()[2])
    phases = exchange.workspace.traffic.num_phases
    exchange.close()
    return found, same, phases


@pytest.mark.parametrize(
    ("world", "dtype", "hidden"),
    [
        (1, torch.bfloat16, 128),
        (2, torch.float32, 640),
        (4, torch.bfloat16, 128),
        (8, torch.float16, 128),
    ],
)
def test_rows_scales_sources_and_sums_are_those_of_the_definition(on_ranks, world, dtype, hidden):
    assert on_ranks(world, _identities, dtype, hidden) == [([], True, 2 * (len(cases()) + 2))] * world


def _wire(member):
    exchange = make(member, num_experts=6)
    told = []
    for case in (Case(1, 3), Case(2, 3, fp8=FP8[1]), Case(3, 3, fp8=FP8[3], zero_copy=True)):
        before = exchange.workspace.traffic.wire_nbytes
        x, topk_idx, weights = tokens_of(case, exchange.layout, member.rank)
        _, _, handle, _ = exchange.dispatch(x, topk_idx, **case.flags)
        there = exchange.workspace.traffic.wire_nbytes - before
        y = (
            exchange.next_combine_buffer(handle)
            if case.zero_copy
            else torch.zeros(6 // member.world_size, 18, 128).bfloat16()
        )
        exchange.combine(y, topk_idx, weights, handle, zero_copy=case.zero_copy)
        back = exchange.workspace.traffic.wire_nbytes - before - there
        row = {0: 256 + 4, 1: 128 + 4 + 4, 3: 128 + 4 + 4}[len(case.fp8)]
        told.append(
            (
                there,
                back,
                wire_nbytes_of(case, exchange.layout, member.rank, row),
                wire_nbytes_of(case, exchange.layout, member.rank, 256),
            )
        )
    return told


def test_bytes_on_the_wire_are_those_of_the_copies_for_others(on_ranks):
    ranks = on_ranks(3, _wire)
    for number in range(3):
        there, back, wanted, wanted_back = zip(*(told[number] for told in ranks), strict=True)
        assert there == wanted
        # Who owns an expert pushes its rows; of those that are lent, the source reads its own.
        assert sum(back) == sum(wanted_back) > 0
        assert (back == wanted_back) == (number == 2)


EXPERT_0 = torch.zeros(4, 2, dtype=torch.int64)


def _rules(member):
    exchange = make(member, num_max_tokens=4, max_topk=3)
    x, weights, y = torch.ones(4, 128).bfloat16(), torch.ones(4, 2), torch.ones(4, 8, 128).bfloat16()
    told = []
    rows, counts, first, _ = exchange.dispatch(x, EXPERT_0)
    told.append((len(first), list(first)[2:], first[0] is next(iter(first)), first[4]))
    _, _, second, hook = exchange.dispatch(x * 2, EXPERT_0, use_fp8=False, return_recv_hook=True)
    with pytest.raises(UsageError, match="results #1 and #2 are alive"):
        exchange.dispatch(x, EXPERT_0)
    assert exchange.is_alive(first)
    # The first result is left in peace by the calls after it.
    told.append((rows[0][0, 0, 0].float().item(), counts.tolist()))
    out = torch.empty(4, 128, dtype=torch.bfloat16)
    leaving_out = torch.where(torch.tensor([[True, False]]), EXPERT_0, -1)
    given, _ = exchange.combine(y, leaving_out, weights, first, out=out)
    told.append((given is out, hook.is_done, out.unique().tolist()))
    hook()
    assert not exchange.is_alive(first)
    with pytest.raises(UsageError, match="no result here"):
        exchange.combine(y, EXPERT_0, weights, first)
    with pytest.raises(UsageError, match="no result here"):
        exchange.next_combine_buffer(first)
    third_rows, _, third, _ = exchange.dispatch(x * 3, EXPERT_0, use_fp8=False)
    value = third_rows[0, 0, 0].item() if member.rank == 0 else 3.0
    told.append((third_rows.data_ptr() == rows[0].data_ptr(), value))
    # Nobody calls their hooks: the next call completes them, in order.
    sums = [
        exchange.combine(factor * y, EXPERT_0, weights, result, return_recv_hook=True)[0]
        for result, factor in ((third, 3.0), (second, 2.0))
    ]
    del first, second, third
    gc.collect()
    for _ in range(3):
        _, _, handle, _ = exchange.dispatch(x[:0], EXPERT_0[:0])
        del handle
    told.append([one.unique().tolist() for one in sums])
    exchange.close()
    exchange.close()
    with pytest.raises(GroupClosedError):
        exchange.dispatch(x, EXPERT_0)
    return told


def test_at_most_two_results_live_in_memory_that_is_used_again(on_ranks):
    for rank, told in enumerate(on_ranks(2, _rules)):
        fields, first, out, memory, sums = told
        assert fields == (5, [4, 128, 8], True, 8)
        # All tokens of both ranks choose expert 0 twice, which makes one copy each.
        assert first[1] == ([8, 0, 0, 0] if rank == 0 else [0] * 4)
        assert rank == 1 or first[0] == 448.0
        assert out == (True, True, [1.0])
        assert memory == (True, 3.0)
        assert sums == [[6.0], [4.0]]


def _statistics(member):
    exchange = make(member, num_max_tokens=4)
    stats = torch.ones(4, dtype=torch.int32)
    waits, mine = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    exchange.dispatch(torch.ones(4, 128).bfloat16(), EXPERT_0)
    if member.rank == 1:
        time.sleep(0.3)
    x = torch.ones(4, 128).bfloat16()
    exchange.dispatch(x, EXPERT_0, cumulative_recv_stats=stats, wait_recv_cost_stats=waits)
    exchange.dispatch(x[:1], EXPERT_0[:1], cumulative_recv_stats=stats, wait_recv_cost_stats=mine)
    exchange.close()
    others = int(waits.sum() - waits[member.rank, 1 - member.rank]) + int(mine[member.rank])
    return stats.tolist(), waits[member.rank, 1 - member.rank].item(), others


def test_statistics_are_added_up(on_ranks):
    first, second = on_ranks(2, _statistics)
    assert first[0] == [1 + 8 + 2, 1, 1, 1]
    assert second[0] == [1] * 4
    assert 200_000 <= first[1] < 10_000_000
    assert (first[2], second[2]) == (0, 0)


def _refusals(member):
    exchange = make(member, num_max_tokens=4, max_topk=3)
    x, idx, weights = torch.ones(4, 128).bfloat16(), EXPERT_0, torch.ones(4, 2)

    def refused(match, *args, call=exchange.dispatch, **kwargs):
        with pytest.raises(ConfigError, match=match):
            call(*args, **kwargs)

    refused("5 tokens pass the capacity of 4", torch.ones(5, 128).bfloat16(), torch.zeros(5, 2).long())
    refused(r"x is float32 \[4, 128\] on cpu; give bfloat16 \[T, 128\]", x.float(), idx)
    refused(r"topk_idx is int32 \[4, 2\]", x, idx.int())
    refused(r"give int64 \[4, k\]", x, idx[:3])
    refused("4 choices a token; the exchange was made for 1 to 3", x, torch.zeros(4, 4).long())
    refused("token 2 has expert 8 at entry 0", x, torch.tensor([[0], [-1], [8], [9]]))
    refused("needs round_scale=True", x, idx, use_ue8m0=True)
    refused("cumulative_recv_stats is int64", x, idx, cumulative_recv_stats=torch.zeros(4).long())
    refused(r"give int64 \[2\] or \[2, 2\]", x, idx, wait_recv_cost_stats=torch.zeros(3).long())
    _, _, handle, _ = exchange.dispatch(x, idx)
    y = torch.ones(4, 8, 128).bfloat16()
    refuse_back = functools.partial(refused, call=exchange.combine)
    refuse_back("give bfloat16", y.float(), idx, weights, handle)
    refuse_back("topk_weights is float64", y, idx, weights.double(), handle)
    refuse_back(r"topk_idx is \[4, 1\]; its dispatch had \[4, 2\]", y, idx[:, :1], weights, handle)
    refuse_back("token 0 chooses other experts", y, idx + 1, weights, handle)
    refuse_back(r"out= of low_latency combine is bfloat16 \[3, 128\]", y, idx, weights, handle, out=y[0, :3])
    refuse_back("zero_copy=True takes", y, idx, weights, handle, zero_copy=True)
    out, _ = exchange.combine(y, idx, weights, handle)
    exchange.close()
    odd = make(member, "odd", hidden=136)
    refused("a multiple of 128, not 136", torch.ones(1, 136).bfloat16(), idx[:1], call=odd.dispatch)
    odd.close()
    return out.unique().tolist()


def test_what_does_not_fit_is_refused_and_the_exchange_goes_on(on_ranks):
    assert on_ranks(2, _refusals) == [[2.0]] * 2


def _dead(member):
    exchange = make(member, num_experts=6, timeout=30.0)
    x, idx = torch.ones(2, 128).bfloat16(), torch.zeros(2, 1, dtype=torch.int64)
    exchange.dispatch(x, idx)
    if member.rank == 2:
        exchange.workspace.close()
        return "left"
    with pytest.raises(PeerLostError) as caught:
        exchange.dispatch(x, idx)
    return caught.value.peers


def test_a_rank_that_is_gone_is_named(on_ranks):
    assert on_ranks(3, _dead) == [(2,), (2,), "left"]


@pytest.mark.parametrize(
    ("sizes", "nbytes"), [((128, 7168, 8, 256), 1908410496), ((256, 2048, 2, 64), 272630400)]
)
def test_size_hint_is_that_of_deepep(sizes, nbytes):
    assert low_latency.size_hint(*sizes) == nbytes


def _crossed(member, engine):
    """Of two results that are alive, one rank combines this and the other that."""
    exchange, first, second = make(member, engine=engine), Case(1, 3, "full"), Case(2, 3, "full")
    alive = []
    for case in (first, second):
        x, topk_idx, weights = tokens_of(case, exchange.layout, member.rank)
        given = topk_idx.clone()
        rows, _, handle, _ = exchange.dispatch(x, given, use_fp8=False)
        # Choices of the next one are written to the same place.
        given.fill_(-1)
        alive.append((rows, topk_idx, weights, handle))
    for order in ((0, 1), (1, 0)):
        with pytest.raises(CollectiveMismatchError, match="of the last dispatch but 1"):
            exchange.combine(*alive[order[member.rank]])
    for case, result in zip((first, second), alive, strict=True):
        x, _, weights = tokens_of(case, exchange.layout, member.rank)
        out, _ = exchange.combine(*result)
        assert torch.allclose(out.float(), x.float() * weights.sum(1, keepdim=True), rtol=0.02, atol=1e-3)
    exchange.close()


@pytest.mark.parametrize("engine", ["cpu", "triton"])
def test_results_of_different_dispatches_are_not_added_up(on_ranks, engine):
    on_ranks(2, _crossed, engine)
