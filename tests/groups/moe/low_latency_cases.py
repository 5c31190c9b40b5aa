"""Routings for low-latency exchanges, and what has to come of them: from the definition, row by row."""

import dataclasses

import torch

from tcomm.cpu.moe_quantise import dequantise, quantise
from tcomm.groups.moe.low_latency import LowLatency
from tcomm.groups.setup import from_store


@dataclasses.dataclass(frozen=True)
class Case:
    """One dispatch and its combine; every rank can make the tokens of all."""

    seed: int
    topk: int
    kind: str = "random"
    fp8: tuple = ()
    zero_copy: bool = False
    hook: bool = False

    @property
    def flags(self):
        return {name: name in self.fp8 for name in ("use_fp8", "round_scale", "use_ue8m0")}


KINDS = ("random", "holes", "one expert", "none at some", "empty", "full", "nothing", "twice")


def tokens_of(case, layout, rank, dtype=torch.bfloat16):
    """(x, topk_idx, topk_weights) of a rank. Each row of x begins with the token's global id."""
    generator = torch.Generator().manual_seed(1000 * case.seed + rank)
    num_experts = layout.world_size * layout.num_local_experts
    num_tokens = int(torch.randint(0, layout.max_tokens + 1, (1,), generator=generator))
    if case.kind == "full":
        num_tokens = layout.max_tokens
    if case.kind == "empty" and rank % 2 == case.seed % 2:
        num_tokens = 0
    x = torch.randn(num_tokens, layout.hidden, generator=generator) * 10.0 ** (case.seed % 5 - 2)
    x[:, 0] = torch.arange(num_tokens) + rank * layout.max_tokens
    topk_idx = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, : case.topk].clone()
    if case.kind == "holes":
        topk_idx[torch.rand(topk_idx.shape, generator=generator) < 0.4] = -1
    if case.kind == "one expert":
        topk_idx[:, 1:] = -1
        topk_idx[:, 0] = case.seed % num_experts
    if case.kind == "none at some":
        topk_idx[topk_idx % 2 == 1] = -1
    if case.kind == "nothing":
        topk_idx[:] = -1
    if case.kind == "twice":
        topk_idx[:, -1] = topk_idx[:, 0]
    return x.to(dtype), topk_idx, torch.rand(num_tokens, case.topk, generator=generator)


def wanted_rows(case, layout, rank, dtype=torch.bfloat16):
    """For each local expert of a rank: rows (source, token) in order."""
    wanted = []
    for local in range(layout.num_local_experts):
        expert = rank * layout.num_local_experts + local
        chosen = [tokens_of(case, layout, source, dtype)[1] == expert for source in range(layout.world_size)]
        wanted.append(
            [(source, int(t)) for source, one in enumerate(chosen) for t in one.any(1).nonzero().squeeze(1)]
        )
    return wanted


def wire_nbytes_of(case, layout, rank, row_nbytes, masked=()):
    """Bytes of the copies that a rank gives to others."""
    topk_idx = tokens_of(case, layout, rank)[1]
    pairs = {(t, int(e)) for t, row in enumerate(topk_idx) for e in row if e >= 0}
    return row_nbytes * sum(e // layout.num_local_experts not in {rank, *masked} for _, e in pairs)


def expert(rows, number):
    """What expert `number` makes of rows; exact in float32."""
    return rows.float() * (number % 4 + 1)


def wanted_sum(case, layout, rank, given, dtype=torch.bfloat16, masked=()):
    """The sum that `rank` gets, by the definition; `given` are its rows as experts see them."""
    _, topk_idx, weights = tokens_of(case, layout, rank, dtype)
    total = torch.zeros(given.shape)
    for j in range(topk_idx.shape[1]):
        for t, number in enumerate(topk_idx[:, j].tolist()):
            if number >= 0 and number // layout.num_local_experts not in masked:
                total[t] += weights[t, j] * expert(given[t], number).to(dtype).float()
    return total.to(dtype)


def as_experts_see(case, x):
    """Rows after their way, in float32."""
    return dequantise(*quantise(x, **_scaling(case))) if case.fp8 else x.float()


def _scaling(case):
    return {name: flag for name, flag in case.flags.items() if name != "use_fp8"}


def make(member, name="ll", num_max_tokens=6, hidden=128, num_experts=8, **kwargs):
    members = from_store(member.store, member.rank, member.world_size, name)
    return LowLatency(members, num_max_tokens, hidden, num_experts, **{"timeout": 20.0, **kwargs})


def run_case(exchange, case):
    """Dispatch, experts, combine: (received bits, ranges, sources, counts, sum)."""
    rank, dtype = exchange.workspace.rank, exchange.dtype
    x, topk_idx, weights = tokens_of(case, exchange.layout, rank, dtype)
    received, counts, handle, hook = exchange.dispatch(x, topk_idx, return_recv_hook=case.hook, **case.flags)
    if case.hook:
        hook()
    rows, scales = received if case.fp8 else (received, None)
    seen = rows if scales is None else dequantise(rows, scales)
    numbers = torch.arange(len(counts)) + rank * len(counts)
    y = torch.stack([expert(one, int(number)) for one, number in zip(seen, numbers, strict=True)]).to(dtype)
    if case.zero_copy:
        y = exchange.next_combine_buffer(handle).copy_(y)
    told = (
        [one[:count].view(torch.uint8).tolist() for one, count in zip(rows, counts, strict=True)],
        None if scales is None else [s[:count].tolist() for s, count in zip(scales, counts, strict=True)],
        [info[:count].tolist() for info, count in zip(handle[0], counts, strict=True)],
        [[(int(r) >> 32, int(r) & 0xFFFFFFFF) for r in ranges] for ranges in handle[1]],
    )
    out, hook = exchange.combine(
        y, topk_idx, weights, handle, zero_copy=case.zero_copy, return_recv_hook=case.hook
    )
    if case.hook:
        hook()
    return (*told, out)


def mistakes_of(exchange, case):
    """What is wrong with one case on this rank; nothing: []."""
    layout, rank, dtype = exchange.layout, exchange.workspace.rank, exchange.dtype
    rows, scales, sources, ranges, out = run_case(exchange, case)
    sent = [tokens_of(case, layout, source, dtype)[0] for source in range(layout.world_size)]
    wanted = wanted_rows(case, layout, rank, dtype)
    quantised = [quantise(x, **_scaling(case)) for x in sent] if case.fp8 else [(x, None) for x in sent]
    found = []
    if rows != [[quantised[s][0][t].view(torch.uint8).tolist() for s, t in one] for one in wanted]:
        found.append("rows")
    if case.fp8 and scales != [[quantised[s][1][t].tolist() for s, t in one] for one in wanted]:
        found.append("scales")
    if sources != [[t for _, t in one] for one in wanted]:
        found.append("sources")
    counts = [[sum(s == source for s, _ in one) for source in range(layout.world_size)] for one in wanted]
    begins = [[sum(line[:source]) for source in range(layout.world_size)] for line in counts]
    if ranges != [list(zip(*pair, strict=True)) for pair in zip(begins, counts, strict=True)]:
        found.append(f"ranges {ranges}")
    given = as_experts_see(case, sent[rank])
    if not torch.equal(out, wanted_sum(case, layout, rank, given, dtype)):
        found.append("sum")
    return [f"rank {rank} {case}: {told}" for told in found]


def has_the_same_bits_twice(exchange, case):
    """Whether a case comes out alike in every bit when it is run again."""
    first, second = run_case(exchange, case), run_case(exchange, case)
    return first[:-1] == second[:-1] and torch.equal(first[-1], second[-1])
