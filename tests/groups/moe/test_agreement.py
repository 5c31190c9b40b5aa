"""One routing by every exchange: the same bits, the bytes that the routing says, and kernels of their own."""

import collections
import itertools

import pytest
import torch

from tcomm.cpu.moe_quantise import dequantise, quantise
from tcomm.groups.moe.high_throughput import HighThroughput
from tcomm.groups.moe.low_latency import LowLatency
from tcomm.groups.moe.one_sided import OneSided
from tcomm.groups.moe.two_sided import TwoSided
from tcomm.groups.setup import from_store
from tcomm.kernels.launch import launches
from tests.groups.moe.routings import destinations, factor_of, ids_of, in_order_sum, same_bytes

HIDDEN, TOP_K, EXPERTS, MOST, FACTS = 256, 3, 8, 6, 3 * (4 + 4)
NAMES = ("high_throughput", "one_sided", "two_sided")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def open_all(member, engine, most=MOST):
    """Every exchange that brings a token once to each rank."""

    def members(name):
        return from_store(member.store, member.rank, member.world_size, f"agree/{name}/{engine}")

    options = {"engine": engine, "timeout": 30.0}
    nbytes = 4 * HIDDEN + FACTS
    return {
        "high_throughput": HighThroughput(members("ht"), 1 << 20, **options),
        "one_sided": OneSided(members("one"), most, TOP_K, EXPERTS, nbytes, 4 * HIDDEN, **options),
        "two_sided": TwoSided(members("two"), num_nbytes=64 << 10, **options),
    }


def there_and_back(name, exchange, parts, ids, weights, experts, most=MOST):
    """Rows of each part as received, in order, what the experts made of them added up, ids, and weights."""
    rank = exchange.workspace.rank
    if name == "high_throughput":
        x = parts[0] if len(parts) == 1 else tuple(parts)
        came = exchange.dispatch(x, ids, weights, EXPERTS)
        rows = [came.x] if len(parts) == 1 else list(came.x)
        out, _ = exchange.combine(experts(rows), came.handle)
        return rows, came.topk_idx, came.topk_weights, out
    local, first = EXPERTS // exchange.workspace.world_size, rank * EXPERTS // exchange.workspace.world_size
    if name == "one_sided":
        narrow = ids.int()
        views = exchange.dispatch(narrow, [*parts, narrow, weights], most, invalid_token_expert_id=EXPERTS)
        sent = (views[-2] != EXPERTS).any(2)
        *rows, their_ids, told = [view[sent] for view in views]
        made = experts(rows)
        results = torch.full((*sent.shape, HIDDEN), float("nan"), dtype=made.dtype)
        results[sent] = made
        out = exchange.combine(results, most)
    else:
        info, their_ids, told = exchange.prepare(ids.int(), weights, most, EXPERTS)
        count = int(info.received.sum())
        their_ids, told = their_ids[:count], told[:count]
        rows = [exchange.alltoallv(part, info)[:count] for part in parts]
        made = experts(rows)
        results = torch.full((info.num_rows, HIDDEN), float("nan"), dtype=made.dtype)
        results[:count] = made
        out = exchange.combine(results, info, TOP_K)
    ours = (their_ids >= first) & (their_ids < first + local)
    return rows, torch.where(ours, their_ids.long() - first, -1), torch.where(ours, told, 0.0), out


def _tokens(turn, rank, num_tokens, dtype, scaled):
    generator = torch.Generator().manual_seed(100 * turn + rank)
    x = (torch.randn(num_tokens, HIDDEN, generator=generator) * 3).to(dtype)
    weights = torch.rand(num_tokens, TOP_K, generator=generator)
    return list(quantise(x)) if scaled else [x], weights


def _agree(member, engines, turns):
    world, me = member.world_size, member.rank
    opened = {engine: open_all(member, engine) for engine in engines}
    for turn in range(turns):
        dtype, scaled = DTYPES[turn % 3], turn % 2 == 1
        num_tokens = [(5 * turn + 4 * rank) % (MOST + 1) for rank in range(world)]
        ids = ids_of("random", turn, me, num_tokens[me], TOP_K, EXPERTS)
        parts, weights = _tokens(turn, me, num_tokens[me], dtype, scaled)

        def experts(rows, dtype=dtype, scaled=scaled):
            x = dequantise(*rows) if scaled else rows[0].float()
            return (x * factor_of(me)).to(dtype)

        found = {
            (name, engine): there_and_back(name, opened[engine][name], parts, ids, weights, experts)
            for name in NAMES
            for engine in engines
        }
        x = dequantise(*parts) if scaled else parts[0].float()
        sums = [
            in_order_sum([(x[t] * factor_of(rank)).to(dtype) for rank in ranks], HIDDEN, dtype)
            for t, ranks in enumerate(destinations(ids, world, EXPERTS))
        ]
        wanted = torch.stack(sums) if sums else torch.empty(0, HIDDEN, dtype=dtype)
        first = found[NAMES[0], engines[0]]
        assert same_bytes(first[3], wanted), turn
        for key, one in found.items():
            assert len(one[0]) == len(first[0])
            assert all(map(same_bytes, one[0], first[0])), (key, turn)
            assert all(map(same_bytes, one[1:], first[1:])), (key, turn)
    for exchanges in opened.values():
        for exchange in exchanges.values():
            exchange.close()


@pytest.mark.parametrize(("world", "engines", "turns"), [(2, ("cpu", "triton"), 4), (4, ("cpu",), 8)])
def test_exchanges_with_one_copy_for_each_rank_have_the_same_bits(on_ranks, world, engines, turns):
    on_ranks(world, _agree, engines, turns)


def _by_expert(member):
    """Low latency adds up experts, the others ranks: where each rank has one expert of a token, likewise."""
    world, me = member.world_size, member.rank
    exchanges = open_all(member, "cpu")
    members = from_store(member.store, me, world, "agree/ll")
    slots = LowLatency(members, MOST, HIDDEN, EXPERTS, max_topk=TOP_K, timeout=30.0)
    for turn in range(4):
        order = torch.rand(MOST, world, generator=torch.Generator().manual_seed(turn)).argsort(1)
        ids = order[:, :TOP_K] * (EXPERTS // world) + turn % (EXPERTS // world)
        (x,), _ = _tokens(turn, me, MOST, torch.bfloat16, scaled=False)
        ones = torch.ones(MOST, TOP_K)

        def experts(rows):
            return (rows[0].float() * factor_of(me)).bfloat16()

        told = [there_and_back(name, one, [x], ids, ones, experts)[3] for name, one in exchanges.items()]
        came, _, handle, _ = slots.dispatch(x, ids, use_fp8=False)
        told.append(slots.combine(experts([came]), ids, ones, handle)[0])
        assert all(same_bytes(one, told[0]) for one in told)


def test_low_latency_has_the_bits_of_the_others_where_a_rank_has_one_expert_of_a_token(on_ranks):
    on_ranks(4, _by_expert)


KERNELS = {
    "high_throughput": (
        "_stage_tokens_kernel _fetch_heads_kernel _gather_rows_kernel",
        "_return_rows_kernel _sum_places_kernel",
    ),
    "one_sided": (
        "_push_payload_kernel _open_call_kernel _take_counts_kernel",
        "_stage_results_kernel _open_call_kernel _pull_sums_kernel",
    ),
    "two_sided": (
        "_open_call_kernel _take_counts_kernel _stream_rows_kernel",
        "_open_call_kernel _stream_rows_kernel",
    ),
    "low_latency": (
        "_plan_kernel _send_copies_kernel _receive_copies_kernel",
        "_send_rows_kernel _sum_rows_kernel",
    ),
}
"""Of the way there and the way back."""


def _snapshot(traffic):
    return traffic.wire_nbytes, traffic.num_phases, collections.Counter(launches)


def _between(*snapshots):
    return [
        (after[0] - before[0], after[1] - before[1], set(after[2] - before[2]))
        for before, after in itertools.pairwise(snapshots)
    ]


def _account(member, engine, most):
    """Pairs of tokens and other ranks; copies for experts there; and, for each exchange, both ways:
    bytes, waits and kernels."""
    world, me = member.world_size, member.rank
    ids = ids_of("random", 3, me, most, TOP_K, EXPERTS)
    (x,), weights = _tokens(1, me, most, torch.bfloat16, scaled=False)
    found = {}

    for name, exchange in open_all(member, engine, most).items():
        traffic = exchange.workspace.traffic
        marks = [_snapshot(traffic)]

        def experts(rows, traffic=traffic, marks=marks):
            marks.append(_snapshot(traffic))
            return rows[0].clone()

        there_and_back(name, exchange, [x], ids, weights, experts, most)
        end = _snapshot(traffic)
        found[name] = _between(marks[0], marks[1], end)
        exchange.close()
    members = from_store(member.store, me, world, f"agree/ll/{engine}")
    slots = LowLatency(members, most, HIDDEN, EXPERTS, max_topk=TOP_K, timeout=30.0, engine=engine)
    traffic = slots.workspace.traffic
    for lends in (False, True):
        begin = _snapshot(traffic)
        came, _, handle, _ = slots.dispatch(x, ids, use_fp8=False)
        between = _snapshot(traffic)
        y = slots.next_combine_buffer(handle).copy_(came) if lends else came.clone()
        slots.combine(y, ids, weights, handle, zero_copy=lends)
        end = _snapshot(traffic)
        found["lent" if lends else "low_latency"] = _between(begin, between, end)
    slots.close()
    pairs = sum(rank != me for ranks in destinations(ids, world, EXPERTS) for rank in ranks)
    local = EXPERTS // world
    copies = int(((ids >= 0) & (ids // local != me)).sum())
    return pairs, copies, found


@pytest.mark.parametrize(("engine", "most"), [("cpu", 64), ("triton", 12)])
def test_bytes_and_waits_are_those_of_the_routing_and_kernels_are_of_each_exchange(on_ranks, engine, most):
    told = on_ranks(2, _account, engine, most)
    row, copy = 2 * HIDDEN, 2 * HIDDEN + 4
    for me, (pairs, copies, found) in enumerate(told):
        their_pairs, their_copies, _ = told[1 - me]
        assert pairs > 0
        assert copies > pairs
        nbytes = {name: [one[0] for one in both] for name, both in found.items()}
        # A list of 4 bytes for each row, and one head.
        least = their_pairs * (row + FACTS)
        assert nbytes["high_throughput"] == [least + 4 * their_pairs + 8 * 5, their_pairs * row]
        assert most < 64 or nbytes["high_throughput"][0] <= 1.02 * least
        assert nbytes["one_sided"] == [pairs * (row + FACTS), pairs * row]
        assert nbytes["two_sided"] == [pairs * (row + FACTS), their_pairs * row]
        assert nbytes["low_latency"] == [copies * copy, their_copies * row]
        assert nbytes["lent"] == [copies * copy, copies * row]
        waits = {name: [one[1] for one in both] for name, both in found.items()}
        assert waits == {name: [1, 1] for name in found} | {"two_sided": [3, 1]}
        for name, both in KERNELS.items():
            wanted = [set(one.split()) if engine == "triton" else set() for one in both]
            assert [one[2] for one in found[name]] == wanted, name


def test_no_two_exchanges_have_their_kernels_in_common():
    shared = {"_open_call_kernel", "_take_counts_kernel"}
    listed = [set(" ".join(both).split()) - shared for both in KERNELS.values()]
    assert len(set.union(*listed)) == sum(map(len, listed))
