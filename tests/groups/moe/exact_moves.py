"""What a dispatch and a combine mean, worked out token by token, and random routes."""

import torch


def make_routes(seed, world, tokens, num_topk, num_experts, kind="random"):
    """Every rank's choices: distinct experts, some of them missing."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for count in tokens:
        scores = torch.rand(count, num_experts, generator=generator)
        idx = scores.argsort(1)[:, :num_topk].contiguous()
        if kind == "random":
            idx[torch.rand(count, num_topk, generator=generator) < 0.2] = -1
        elif kind == "one":
            idx = torch.full_like(idx, -1)
            idx[:, -1] = num_experts - 1
        elif kind == "not_first":
            idx[idx < num_experts // world] = -1
        elif kind == "none":
            idx.fill_(-1)
        found.append(idx)
    return found


def make_rows(tokens, hidden, dtype, salt=0):
    """Every rank's rows; their bytes follow from the token's number among all."""
    found, first = [], 0
    for count in tokens:
        ids = torch.arange(first, first + count)[:, None]
        steps = torch.arange(hidden)[None]
        values = ((ids * 37 + steps * 11 + salt * 5) % 251 - 125).float() / 16
        found.append(values.to(dtype))
        first += count
    return found


def make_weights(seed, tokens, num_topk):
    generator = torch.Generator().manual_seed(seed + 1000)
    return [torch.rand(count, num_topk, generator=generator) for count in tokens]


def holders_of(idx, num_experts, world):
    """For each token, ranks in the order in which they come in its list."""
    local = num_experts // world
    return [list(dict.fromkeys(e // local for e in row if e >= 0)) for row in idx.tolist()]


def expect_dispatch(rank, rows, idx, weights, num_experts):
    """(source, token) of each row, the rows, their ids and weights, rows for each expert."""
    world = len(rows)
    local = num_experts // world
    come = [
        (source, token)
        for source in range(world)
        for token, holders in enumerate(holders_of(idx[source], num_experts, world))
        if rank in holders
    ]
    if not come:
        width = idx[0].shape[1]
        empty = torch.empty(0, width, dtype=torch.int64)
        return come, rows[0][:0], empty, empty.float(), [0] * local
    got = torch.stack([rows[s][t] for s, t in come])
    ids = torch.stack([idx[s][t] for s, t in come]) - rank * local
    away = (ids < 0) | (ids >= local)
    told = torch.stack([weights[s][t] for s, t in come]).masked_fill(away, 0)
    ids = ids.masked_fill(away, -1)
    return come, got, ids, told, [int((ids == expert).sum()) for expert in range(local)]


def expect_combine(rank, idx, num_experts, results, comes, terms=()):
    """Sums in float32 over a token's ranks in order, then terms; `results[r]` are rows of rank r."""
    world = len(idx)
    dtype, hidden = results[0].dtype, results[0].shape[1]
    out = torch.zeros(len(idx[rank]), hidden, dtype=torch.float32)
    where = [{pair: row for row, pair in enumerate(come)} for come in comes]
    for token, holders in enumerate(holders_of(idx[rank], num_experts, world)):
        for holder in holders:
            out[token] += results[holder][where[holder][rank, token]].float()
    for term in terms:
        out += term.float()
    return out.to(dtype)
