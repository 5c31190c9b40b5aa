"""Routings that every rank can work out for all, and payloads made from a token's global id."""

import torch

EXPERTS = 24
KINDS = ("random", "one_expert", "some_ranks_empty", "no_selection", "full")


def tokens_of(kind, turn, rank, most):
    if kind == "some_ranks_empty":
        return 0 if (rank + turn) % 2 else min(3, most)
    if kind == "full":
        return most
    return torch.Generator().manual_seed(977 * turn + rank).initial_seed() % (most + 1)


def ids_of(kind, turn, rank, num_tokens, top_k, num_experts=EXPERTS):
    """[T, k] int64: different experts for each token, some of them none."""
    rng = torch.Generator().manual_seed(31 * turn + 7 * rank + top_k)
    if kind == "one_expert":
        ids = torch.full((num_tokens, top_k), -1)
        ids[:, top_k - 1] = turn % num_experts
        return ids
    if kind == "no_selection":
        return torch.full((num_tokens, top_k), -1)
    draws = torch.rand(num_tokens, num_experts, generator=rng)
    ids = draws.argsort(1)[:, :top_k].clone()
    if kind != "full":
        ids[torch.rand(num_tokens, top_k, generator=rng) < 0.2] = -1
    return ids


def destinations(ids, world, num_experts=EXPERTS):
    """For each token its ranks, in the order in which they first appear."""
    held = num_experts // world
    return [list(dict.fromkeys(e // held for e in row if e >= 0)) for row in ids.tolist()]


def content(turn, rank, num_tokens, tail, dtype):
    """[T, *tail]: bytes that no other token, rank or turn has."""
    numel = 1
    for length in tail:
        numel *= length
    token = torch.arange(num_tokens)[:, None] + 1000 * rank + 7919 * turn
    value = token * 37 + torch.arange(numel)[None] * 11
    if dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        return (value % 120).to(dtype).view(num_tokens, *tail)
    return ((value % 1009).to(torch.float32) / 3 - 168).to(dtype).view(num_tokens, *tail)


def factor_of(rank):
    """What a rank's experts multiply by: sums in another order have other bits."""
    return (1.0, 1 / 3, 7.7, 1 / 7, 3.3, 1 / 900, 1.7, 0.3)[rank]


def same_bytes(a, b):
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def in_order_sum(terms, hidden, dtype):
    """Sum in fp32 of rows, one after another."""
    total = torch.zeros(hidden)
    for term in terms:
        total = total + term.to(torch.float32)
    return total.to(dtype)
