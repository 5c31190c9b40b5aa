"""The one-sided and the two-sided exchange of virtual ranks, on any device."""

import torch

from tcomm.groups.moe.routes import Routes, as_word_rows, make_routes
from tcomm.kernels import moe_one_sided, moe_two_sided
from tcomm.memory.rings import RingLayout
from tcomm.signature import CallDescription
from tests.groups.moe.routings import content, destinations, ids_of, in_order_sum
from tests.kernels.virtual_arenas import arena_of_half, device_of, same_bits, settle

CALL = CallDescription("turn", "rows")
FIRST = 1024
"""Where rows of the one-sided exchange begin, behind the words of its calls."""


def _routed(device, world, turn, num_tokens, top_k, num_experts):
    """Routes of all virtual ranks in one, and the destinations of each token."""
    ids = [ids_of("random", turn, rank, num_tokens, top_k, num_experts) for rank in range(world)]
    routes = [make_routes(one.to(device), num_experts, world) for one in ids]
    tables = zip(*(one.tables for one in routes), strict=True)
    return Routes(*map(torch.stack, tables)), [destinations(one, world, num_experts) for one in ids]


def check_one_sided(device, world, mode, most=6, hidden=16, dtype=torch.float32, top_k=3, local=4, turns=3):
    """Rows come to the ranks that use them, and go back as sums in the order of a token's ranks."""
    device, experts = device_of(device), local * world
    combine_at = FIRST + world * most * hidden * dtype.itemsize
    arena = arena_of_half(world, device, 2 * combine_at, mode)
    for turn in range(turns):
        num_tokens, runtime_max = most - turn, most - turn % 2
        routes, where = _routed(device, world, turn, num_tokens, top_k, experts)
        x = torch.stack([content(turn, r, num_tokens, (hidden,), dtype) for r in range(world)])
        words = torch.stack([as_word_rows(one) for one in x]).to(device)
        received = moe_one_sided.dispatch([words], [FIRST], routes.tables, runtime_max, arena, CALL, 20.0)
        base, buffer = arena.staging.layout.half(0), arena.staging.buffer
        shape = (world, runtime_max, hidden)
        got = torch.stack([buffer.peer(rank, shape, dtype, base + FIRST) for rank in range(world)])
        factors = torch.arange(1, world + 1, device=device).view(-1, 1, 1, 1)
        out = torch.empty(world, num_tokens, hidden, dtype=dtype, device=device)
        made = got * factors.to(dtype)
        moe_one_sided.combine(made, out, combine_at, routes.tables, received, runtime_max, arena, CALL, 20.0)
        settle(arena)
        got, received, out = got.cpu(), received.cpu(), out.cpu()
        for rank in range(world):
            for source in range(world):
                to_me = [t for t, ranks in enumerate(where[source]) if rank in ranks]
                assert received[rank, source] == len(to_me)
                assert same_bits(got[rank, source, : len(to_me)], x[source, to_me])
            rows = [
                in_order_sum([x[rank, t] * (r + 1) for r in where[rank][t]], hidden, dtype)
                for t in range(num_tokens)
            ]
            assert same_bits(out[rank], torch.stack(rows))


def check_two_sided(device, sent, mode, lanes, slot_nbytes=128, row_words=4, turns=2):
    """Rows stream through rings by lanes that work side by side; `sent[r][s]`: rows from rank r to s."""
    device, sent = device_of(device), torch.tensor(sent)
    world, capacity = len(sent), int(sent.max())
    num_sent, num_taken = int(sent.sum(1).max()), int(sent.sum(0).max()) + 2
    layout = RingLayout(world, lanes, slot_nbytes)
    arena = arena_of_half(world, device, layout.nbytes, mode)
    rows, there = torch.arange(capacity, device=device), sent.to(device)
    for turn in range(turns):
        received = moe_two_sided.announce(there, arena, CALL, 20.0)
        given = (there.cumsum(1) - there)[:, :, None] + rows
        taken = (received.cumsum(1) - received)[:, :, None] + rows
        ranks, lines = torch.arange(world)[:, None, None], torch.arange(num_sent)[:, None]
        x = ranks * 1_000_000 + lines * 10_000 + torch.arange(row_words) + turn
        out = torch.full((world, num_taken, row_words), -1, device=device)
        moe_two_sided.exchange_rows(
            x.to(device), out, (given, there), (taken, received), layout, arena, CALL, 20.0
        )
        settle(arena)
        assert received.tolist() == sent.t().tolist()
        out = out.cpu()
        for rank in range(world):
            first = sent[:, :rank].sum(1).tolist()
            wanted = torch.cat([x[s, first[s] : first[s] + sent[s, rank]] for s in range(world)])
            assert same_bits(out[rank, : len(wanted)], wanted)
            assert out[rank, len(wanted) :].eq(-1).all()
