"""Dispatch and combine of virtual ranks in one process, launch by launch, on any device."""

import torch

from tcomm.kernels.moe_high_throughput import StagedTokens, fetch_heads, gather_rows, stage_tokens
from tcomm.kernels.moe_layout import find_layout
from tcomm.kernels.moe_return import return_rows, sum_places
from tcomm.memory.token_regions import DispatchRegions, ReturnRegions
from tcomm.memory.virtual import VirtualArena
from tcomm.signature import CallDescription
from tests.groups.moe.exact_moves import (
    expect_combine,
    expect_dispatch,
    holders_of,
    make_routes,
    make_rows,
    make_weights,
)
from tests.kernels.virtual_arenas import device_of, failure_of, leave_out, same_bits, settle
from tests.virtual_worlds import count_different

DISPATCH, COMBINE = CallDescription("dispatch", "int64"), CallDescription("combine", "int64")


class VirtualTokens:
    """Ranks that all have as many tokens. Their tensors may get other contents between calls.

    Args:
        rows: [W, T, H].
        idx: [W, T, k] int64.
        weights: [W, T, k] float32.
        num_experts: of all ranks.
    """

    def __init__(self, rows, idx, weights, num_experts, mode="grid", staging_bytes=1 << 18):
        self.world, self.num_tokens = rows.shape[:2]
        self.rows, self.idx, self.weights = rows, idx, weights
        self.num_experts, self.timeout = num_experts, 60.0
        self.arena = VirtualArena(self.world, rows.device, staging_bytes, mode)
        self.width = min(idx.shape[2], self.world)

    def dispatch(self, num_rows):
        """Rows, ids, weights and places of all ranks: [W, num_rows, ...]. Nothing is awaited on the host."""
        layouts = [find_layout(one, self.num_experts, self.world) for one in self.idx]
        self.slots = torch.stack([one.slots for one in layouts])
        prefix = torch.stack([one.prefix for one in layouts])
        words, num_topk = self.rows.view(torch.int64), self.idx.shape[2]
        nothing = words.new_empty(self.world, self.num_tokens, 0, dtype=torch.int32)
        half = self.arena.staging.layout.half_bytes
        regions = DispatchRegions(half, self.world, words.shape[2] * 8, 2 * num_topk)
        weights = self.weights.view(torch.int32)
        tokens = StagedTokens(words, self.idx, weights, nothing, self.slots, prefix, self.width)
        rows = words.new_zeros(self.world, num_rows, words.shape[2])
        facts = words.new_full((self.world, num_rows, 2 * num_topk), -1, dtype=torch.int32)
        self.row_slots = words.new_full((self.world, num_rows), -1)
        fetched = words.new_zeros(self.world, self.world)
        for first in range(0, max(self.num_tokens, 1), regions.num_tokens):
            epoch = stage_tokens(tokens, self.arena, DISPATCH, self.timeout, regions, first)
            heads = fetch_heads(self.arena, DISPATCH, self.timeout, epoch, regions)
            gather_rows(
                rows, facts, self.row_slots, heads, fetched, self.arena, DISPATCH, self.timeout, epoch,
                regions, self.width, first,
            )  # fmt: skip
            # Of rank r, what each source sent it in this piece.
            fetched += heads[:, :, self.world : 2 * self.world].diagonal(dim1=0, dim2=2).t()
        self.heads = heads
        self.matrix = heads[:, :, : self.world].to(torch.int32).contiguous()
        told = facts[:, :, num_topk:].contiguous().view(torch.float32)
        return rows.view(self.rows.dtype), facts[:, :, :num_topk], told

    def combine(self, results, weights, terms=()):
        """Sums of all ranks' rows [W, num_rows, H] and weights: [W, T, ...]."""
        words, half = results.view(torch.int64), self.arena.staging.layout.half_bytes
        regions = ReturnRegions(half, self.width, words.shape[2] * 8, weights.shape[2])
        out = results.new_zeros(self.world, self.num_tokens, results.shape[2])
        summed = weights.new_zeros(self.world, self.num_tokens, weights.shape[2])
        for first in range(0, max(self.num_tokens, 1), regions.num_tokens):
            epoch = return_rows(
                words, self.row_slots, weights.view(torch.int32), self.matrix, self.arena, COMBINE,
                self.timeout, regions, first,
            )  # fmt: skip
            sum_places(
                out, summed, self.slots, terms, self.arena, COMBINE, self.timeout, epoch, regions, first
            )
        return out, summed


class TokensCase:
    """What ranks give, in host memory, and what has to come of it.

    Args:
        world: number of ranks.
        tokens: of each.
        num_experts: of all.
    """

    def __init__(self, world, tokens, hidden, dtype, num_topk, num_experts, seed, kind="random"):
        self.world, self.counts, self.num_experts = world, [tokens] * world, num_experts
        self.idx = make_routes(seed, world, self.counts, num_topk, num_experts, kind)
        self.weights = make_weights(seed, self.counts, num_topk)
        self.rows = make_rows(self.counts, hidden, dtype, seed)
        self.come = [
            expect_dispatch(rank, self.rows, self.idx, self.weights, num_experts) for rank in range(world)
        ]

    @property
    def most(self):
        """Rows of the rank that gets most."""
        return max(len(one[0]) for one in self.come)

    def exchange(self, device, mode="grid", staging_bytes=1 << 18):
        given = [torch.stack(each).to(device_of(device)) for each in (self.rows, self.idx, self.weights)]
        return VirtualTokens(*given, self.num_experts, mode, staging_bytes)

    def check_dispatched(self, exchange, got, ids, told):
        """Check what a dispatch gave, of which nobody has waited."""
        settle(exchange.arena)
        got, ids, told, slots = (x.cpu() for x in (got, ids, told, exchange.row_slots))
        local, room = self.num_experts // self.world, got.shape[1]
        sent = [[sum(s == source for s, _ in one[0]) for one in self.come] for source in range(self.world)]
        for rank, (come, x, experts, weight, _) in enumerate(self.come):
            here = slice(0, len(come))
            assert same_bits(got[rank][here], x)
            found = ids[rank][here] - rank * local
            away = (found < 0) | (found >= local)
            assert torch.equal(found.masked_fill(away, -1), experts.int())
            assert torch.equal(told[rank][here].masked_fill(away, 0), weight)
            sources = slots[rank].div(exchange.width, rounding_mode="floor")
            assert sources.tolist() == [token for _, token in come] + [-1] * (room - len(come))
            assert exchange.matrix[rank].tolist() == sent
            assert exchange.heads[rank, :, -1].tolist() == self.counts


def check_dispatch(device, world, mode, tokens, hidden, staging, dtype=torch.bfloat16, num_topk=3, local=4):
    """Rows, ids, weights and places are those of the definition."""
    case = TokensCase(world, tokens, hidden, dtype, num_topk, local * world, 2)
    exchange = case.exchange(device, mode, staging)
    case.check_dispatched(exchange, *exchange.dispatch(case.most + 1))


def check_room(device, mode="grid"):
    """Rows beyond the room of a result are left out."""
    case = TokensCase(2, 4, 8, torch.float32, 1, 4, 0, "one")
    exchange = case.exchange(device, mode)
    got, _, _ = exchange.dispatch(5)
    settle(exchange.arena)
    assert same_bits(got[1], torch.cat(case.rows)[:5])
    assert got[0].eq(0).all()


def check_combine(
    device, world, mode, tokens, hidden, dtype, staging, num_terms, num_topk=4, local=2, times=1
):
    """Sums and weights are those of the definition; `times` over, with the same bits."""
    case = TokensCase(world, tokens, hidden, dtype, num_topk, local * world, 1)
    exchange = case.exchange(device, mode, staging)
    generator = torch.Generator().manual_seed(0)
    results = [torch.randn(one[1].shape, generator=generator).to(dtype) for one in case.come]
    given = torch.full((world, world * tokens, hidden), torch.nan, dtype=dtype)
    given_weights = torch.full((world, world * tokens, num_topk), torch.nan)
    for rank, one in enumerate(case.come):
        given[rank, : len(one[0])] = results[rank]
        given_weights[rank, : len(one[0])] = one[3]
    terms = [torch.stack(make_rows(case.counts, hidden, dtype, salt)) for salt in range(num_terms)]
    places = [one[0] for one in case.come]
    wanted = [
        expect_combine(rank, case.idx, case.num_experts, results, places, [term[rank] for term in terms])
        for rank in range(world)
    ]
    given, given_weights, *terms = (x.to(exchange.rows.device) for x in (given, given_weights, *terms))
    for _ in range(times):
        exchange.dispatch(world * tokens)
        out, summed = exchange.combine(given, given_weights, terms)
        settle(exchange.arena)
        for rank in range(world):
            assert same_bits(out[rank], wanted[rank])
            idx = case.idx[rank]
            assert torch.equal(summed[rank].cpu(), case.weights[rank].masked_fill(idx < 0, 0))


class Rounds:
    """An exchange whose tokens change between calls, in the same memory, with room for as much as can come.

    What rank r makes of a row is r + 1 times as much.
    """

    def __init__(
        self, device, world, mode, tokens, hidden, dtype, num_topk=3, local=4, staging=1 << 18, seeds=3
    ):  # fmt: skip
        cases = [TokensCase(world, tokens, hidden, dtype, num_topk, local * world, s) for s in range(seeds)]
        self._exchange = cases[0].exchange(device, mode, staging)
        self.arena, self._num_rows = self._exchange.arena, world * tokens
        device = self._exchange.rows.device
        self._ranks, self._local = torch.arange(world, device=device).view(-1, 1, 1), local
        self._given = [
            [torch.stack(each).to(device) for each in (case.rows, case.idx, case.weights)] for case in cases
        ]
        self._wanted = [[x.to(device) for x in self._meaning(case)] for case in cases]

        self._out = [torch.empty_like(x) for x in self._wanted[0]]

    def _meaning(self, case):
        """Sums of rows, and of weights."""
        results = [one[1] * (rank + 1) for rank, one in enumerate(case.come)]
        places = [one[0] for one in case.come]
        sums = [expect_combine(r, case.idx, case.num_experts, results, places) for r in range(case.world)]
        weights = torch.stack(case.weights).masked_fill(torch.stack(case.idx) < 0, 0)
        return torch.stack(sums), weights

    def run(self):
        rows, ids, told = self._exchange.dispatch(self._num_rows)
        # Each rank gives back the weights of its own experts.
        told = told.masked_fill(ids // self._local != self._ranks, 0)
        sums = self._exchange.combine(rows * (self._ranks + 1).to(rows.dtype), told)
        # Where a graph and an eager call both leave them.
        for out, each in zip(self._out, sums, strict=True):
            out.copy_(each)

    def put(self, seed):
        exchange = self._exchange
        for there, given in zip(
            (exchange.rows, exchange.idx, exchange.weights), self._given[seed], strict=True
        ):
            there.copy_(given)
        for out in self._out:
            out.fill_(7)

    def count_wrong(self, seed):
        """Elements of both sums, as a tensor on their device."""
        return sum(
            count_different(got, want) for got, want in zip(self._out, self._wanted[seed], strict=True)
        )


def check_missing_rank(device, world, missing, timeout=1.0):
    """A rank that never comes is named by the others within the deadline."""
    case = TokensCase(world, 4, 16, torch.float32, 2, 2 * world, 0)
    exchange = case.exchange(device, "streams")
    exchange.dispatch(case.most)
    settle(exchange.arena)
    leave_out(exchange.arena, missing)
    exchange.timeout = timeout
    error = failure_of(exchange.arena, lambda: exchange.dispatch(case.most))
    assert tuple(error.peers) == (missing,)


def check_places(device, worlds=(1, 3, 8, 16), step=7):
    """Places follow a token's list and the order of tokens."""
    for seed, world in enumerate(worlds):
        (idx,) = make_routes(seed, world, [step * seed], min(8, 2 * world), 2 * world)
        found = find_layout(idx.to(device_of(device)), 2 * world, world)
        holders = holders_of(idx, 2 * world, world)
        places = [[row.index(rank) if rank in row else -1 for rank in range(world)] for row in holders]
        assert found.slots.tolist() == places
        before = torch.tensor([[r in row for r in range(world)] for row in holders]).view(-1, world).cumsum(0)
        assert found.prefix.tolist() == [[0] * world, *before.tolist()]
        assert found.num_tokens_per_expert.tolist() == [int((idx == e).sum()) for e in range(2 * world)]


def check_out_of_range(device):
    """An expert out of range counts as none."""
    found = find_layout(torch.tensor([[9, 1]], device=device), 4, 2)
    assert found.slots.tolist() == [[0, -1]]
    assert found.num_tokens_per_expert.tolist() == [0, 1, 0, 0]
