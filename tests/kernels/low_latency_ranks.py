"""Low-latency kernels on virtual ranks, without a communicator: what a call needs, for all of them."""

import torch

from tcomm.cpu.moe_quantise import dequantise, quantise
from tcomm.kernels.moe_low_latency import receive_copies, send_copies
from tcomm.kernels.moe_low_latency_combine import send_rows, sum_rows
from tcomm.memory.base import Staging, SymmetricBuffer
from tcomm.memory.control import Word
from tcomm.memory.layout import StagingLayout
from tcomm.memory.moe_slots import RowFormat, SlotLayout
from tcomm.signature import CallDescription
from tests.groups.moe.low_latency_cases import Case, tokens_of
from tests.kernels.virtual_arenas import (
    arena_of_half,
    device_of,
    failure_of,
    leave_out,
    same_bits,
    settle,
    sums_of_products_are_exact,
)
from tests.virtual_worlds import count_different

CALL = CallDescription("low_latency", "bfloat16")
PLAIN = (False, False, False)
SCALINGS = (PLAIN, (True, False, False), (True, True, False), (True, True, True))
"""use_fp8, round_scale, use_ue8m0."""


class VirtualExchange:
    """Tensors have a row for each rank; all ranks have M tokens, some of which choose nothing.

    What ranks give may get other contents between calls: `put`.
    """

    def __init__(
        self, world_size, experts=2, tokens=2, topk=3, hidden=128, scaling=PLAIN,
        *, device="cpu", mode="grid", dtype=torch.bfloat16,
    ):  # fmt: skip
        self.layout = SlotLayout(world_size, experts, tokens, topk, hidden, dtype.itemsize)
        self.form = RowFormat(hidden, dtype, *scaling)
        self.arena = arena_of_half(world_size, device, self.layout.half_nbytes, mode)
        at = {"device": device_of(device)}
        self.x, self.idx, self.weights = (one.to(**at) for one in self.tokens(3))
        self.slots = torch.full(self.idx.shape, 99, dtype=torch.int32, **at)
        self.counts = torch.zeros(world_size, world_size * experts, dtype=torch.int32, **at)
        shape = (world_size, experts, self.layout.capacity)
        self.rows = torch.zeros(*shape, self.form.row_nbytes // 4, dtype=torch.int32, **at)
        words = (world_size, experts, self.form.num_scale_words, shape[2])
        self.scales = torch.zeros(words, dtype=torch.int32, **at)
        self.src_info = torch.full(shape, -1, dtype=torch.int32, **at)
        self.ranges = torch.zeros(world_size, experts, world_size, dtype=torch.int64, **at)
        self.received = torch.zeros(world_size, experts, dtype=torch.int32, **at)
        self.stats = torch.ones(world_size, experts, dtype=torch.int32, **at)
        self.out = torch.zeros_like(self.x)
        self.factors = (torch.arange(world_size * experts, **at) % 3 + 1).view(world_size, experts, 1, 1)

    def tokens(self, seed):
        """x, idx and weights of all ranks, in host memory."""
        layout, dtype = self.layout, self.form.dtype
        case = Case(seed, layout.max_topk, "full")
        given = [tokens_of(case, layout, rank) for rank in range(layout.world_size)]
        x, idx, weights = (torch.stack(one) for one in zip(*given, strict=True))
        idx[0, 0, 0] = -1
        idx[1, :, 1] = idx[1, :, 0]
        idx[-1, 1, 2] = layout.world_size * layout.num_local_experts  # of no meaning: counts as none
        if sums_of_products_are_exact(self.arena.device):
            weights = weights.to(torch.bfloat16).float()
        return x.to(dtype), idx, weights

    def put(self, x, idx, weights):
        self.x.copy_(x)
        self.idx.copy_(idx)
        self.weights.copy_(weights)

    def dispatch(self, timeout=20.0):
        epoch = send_copies(
            self.arena, CALL, timeout, self.layout, self.form, self.x, self.idx, self.slots, self.counts
        )
        receive_copies(
            self.arena, CALL, timeout, epoch, self.layout, self.form, self.rows, self.scales, self.src_info,
            self.ranges, self.received, self.stats, None,
        )  # fmt: skip

    def results(self):
        """What experts make of all rows, also of those that nobody sent: expert e makes e % 3 + 1 times x."""
        rows = self.rows.view(self.form.wire_dtype)
        if self.form.use_fp8:
            rows = dequantise(rows, self.scales.view(self.form.scale_dtype).transpose(2, 3))
        return (rows * self.factors.to(rows.dtype)).to(self.form.dtype)

    def combine(self, results, out, idx=None, lent=None):
        """Sum up into `out`; idx in place of that of the dispatch, lent: memory in which results lie."""
        epoch = send_rows(self.arena, CALL, 20.0, self.layout, results, self.ranges, 1, lent is not None)
        sum_rows(
            self.arena, CALL, 20.0, epoch, self.layout, out, self.idx if idx is None else idx, self.weights,
            self.slots, self.counts, lent,
        )  # fmt: skip

    def quantised(self, x):
        """Rows as they travel, and their scales or None."""
        if not self.form.use_fp8:
            return x, None
        return quantise(x, round_scale=self.form.round_scale, use_ue8m0=self.form.use_ue8m0)

    def sums(self, x, idx, weights):
        """What combine has to give, of tokens in host memory: one term after another."""
        given = dequantise(*self.quantised(x)) if self.form.use_fp8 else x.float()
        total, num_experts = torch.zeros(x.shape), self.layout.world_size * self.layout.num_local_experts
        for j in range(idx.shape[2]):
            experts = idx[:, :, j]
            is_there = (experts >= 0) & (experts < num_experts)
            term = (given * (experts % 3 + 1).unsqueeze(2)).to(x.dtype).float()
            total += torch.where(is_there.unsqueeze(2), weights[:, :, j].unsqueeze(2) * term, 0.0)
        return total.to(x.dtype)

    def run(self):
        """Dispatch, experts, combine into `out`: nothing of it awaits the device."""
        self.dispatch()
        self.combine(self.results(), self.out)

    def round_trip(self, lends, idx=None):
        """Sums of a dispatch and its combine, by `idx` in place of its choices; rows nobody sent are NaN."""
        self.dispatch()
        results, lent = self.results(), None
        results.masked_fill_((self.src_info < 0).unsqueeze(-1), torch.nan)
        if lends:
            lent, views = self.lent_memory()
            for view, rows in zip(views, results, strict=True):
                view.copy_(rows)
        out = torch.full_like(self.x, 7)
        self.combine(results, out, idx, lent)
        settle(self.arena)
        return out

    def lent_memory(self):
        """Two halves on each rank, and the second one of each as [El, R * M, H]."""
        layout = self.layout
        nbytes = StagingLayout.for_half(layout.combine_nbytes, layout.world_size)
        staging = StagingLayout(nbytes, layout.world_size)
        memory = torch.zeros(layout.world_size, nbytes, dtype=torch.uint8, device=self.arena.device)
        buffer = SymmetricBuffer(0, list(memory))
        shape = (layout.num_local_experts, layout.capacity, layout.hidden)
        views = [
            buffer.peer(rank, shape, self.form.dtype, staging.half(1)) for rank in range(layout.world_size)
        ]
        return Staging(buffer, staging), views


def check_dispatch(world, *sizes, **options):
    """Rows, scales, sources, ranges and counts of every expert are those of the definition."""
    ranks = VirtualExchange(world, *sizes, **options)
    ranks.dispatch()
    settle(ranks.arena)
    x, idx, slots = ranks.x.cpu(), ranks.idx.cpu(), ranks.slots.cpu()
    info, told, received = ranks.src_info.cpu(), ranks.ranges.cpu(), ranks.received.cpu()
    rows, words = ranks.quantised(x)
    assert torch.equal(ranks.stats.cpu() - 1, received)
    for rank in range(world):
        for expert in range(ranks.layout.num_local_experts):
            # Pairs of a source and a token, in order.
            number = rank * ranks.layout.num_local_experts + expert
            sources, tokens = (idx == number).any(2).nonzero().unbind(1)
            count = len(sources)
            assert int(received[rank, expert]) == count
            assert torch.equal(info[rank, expert, :count].long(), tokens)
            assert info[rank, expert, count:].eq(-1).all()
            given = ranks.rows[rank, expert, :count].view(ranks.form.wire_dtype)
            assert same_bits(given, rows[sources, tokens])
            if words is not None:
                scales = ranks.scales[rank, expert, :, :count].view(words.dtype)
                assert same_bits(scales.t(), words[sources, tokens])
            counts = torch.bincount(sources, minlength=world)
            assert torch.equal(told[rank, expert] >> 32, counts.cumsum(0) - counts)
            assert torch.equal(told[rank, expert] & 0xFFFFFFFF, counts)
    assert (slots[-1, 1, 2], slots[0, 0, 0]) == (-1, -1)
    assert torch.equal(slots[1, :, 0], slots[1, :, 1])


def check_combine(world, *sizes, lends=False, times=1, **options):
    """Sums are those of the definition, without a token that chooses nothing now; `times` over, the same."""
    ranks = VirtualExchange(world, *sizes, **options)
    leaving_out = ranks.idx.clone()
    leaving_out[-1, 0] = -1
    wanted = ranks.sums(ranks.x.cpu(), leaving_out.cpu(), ranks.weights.cpu())
    for _ in range(times):
        out = ranks.round_trip(lends, leaving_out)
        assert same_bits(out, wanted)
        assert not out[-1, 0].any()


def check_any_weights(world, *sizes, **options):
    """With weights of 24 bits a sum may be rounded once a term, or twice: no bits, but close."""
    ranks = VirtualExchange(world, *sizes, dtype=torch.float32, **options)
    generator = torch.Generator().manual_seed(5)
    x, weights = (torch.rand(each.shape, generator=generator) for each in (ranks.x, ranks.weights))
    ranks.put(x, ranks.idx.cpu(), weights)
    wanted = ranks.sums(x, ranks.idx.cpu(), weights)
    ranks.dispatch()
    out = torch.full_like(ranks.x, 7)
    ranks.combine(ranks.results(), out)
    settle(ranks.arena)
    # All terms are positive, and each is rounded to 24 bits at most twice.
    assert torch.allclose(out.cpu(), wanted, rtol=2.0 ** (1 - 24) * 2 * weights.shape[2], atol=0.0)


def mask(arena, masked):
    """Let ranks leave others out: those from the next launch on."""
    arena.pages[:, Word.LEFT_OUT] = sum(1 << rank for rank in masked)


def check_masked(world, masked, *sizes, lends=False, **options):
    """Ranks that are left out get nothing and count as sources of nothing; then all take part again.

    They come for one whole call first: what they told then is there still, and counts no more.
    """
    ranks = VirtualExchange(world, *sizes, mode="streams", **options)
    arena, parts = ranks.arena, ranks.arena.launch_parts
    ranks.run()
    settle(arena)
    before = int(arena.pages[0, Word.EPOCH])
    mask(arena, masked)
    for rank in masked:
        leave_out(arena, rank)
    ranks.put(*ranks.tokens(4))
    active = [rank for rank in range(world) if rank not in masked]
    theirs = [(arena.staging.buffer.peer(rank), arena.pages[rank]) for rank in masked]
    kept = [[memory.clone() for memory in pair] for pair in theirs]
    # Choices of those that are left out are none.
    idx, experts = ranks.idx.clone().cpu(), ranks.layout.num_local_experts
    for rank in masked:
        idx[idx // experts == rank] = -1
    wanted = ranks.sums(ranks.x.cpu(), idx, ranks.weights.cpu())
    ranks.src_info.fill_(-1)
    for turn in range(3):
        assert same_bits(ranks.round_trip(lends)[active], wanted[active]), turn
    for rank in active:
        for expert in range(experts):
            sources, tokens = (idx[active] == rank * experts + expert).any(2).nonzero().unbind(1)
            counts = torch.bincount(torch.tensor(active)[sources], minlength=world)
            told = ranks.ranges[rank, expert].cpu()
            assert torch.equal(told & 0xFFFFFFFF, counts)
            assert torch.equal(told >> 32, counts.cumsum(0) - counts)
            assert int(ranks.received[rank, expert]) == len(sources)
            assert torch.equal(ranks.src_info[rank, expert, : len(sources)].cpu().long(), tokens)
    for pair, old in zip(theirs, kept, strict=True):
        assert all(map(same_bits, pair, old))
    # All go on together: from one epoch, as they agree on it.
    mask(arena, ())
    arena.launch_parts = parts
    assert int(arena.pages[active[0], Word.EPOCH]) == before + 6
    arena.set_epoch(before + 8)
    ranks.run()
    settle(arena)
    assert same_bits(ranks.out, ranks.sums(ranks.x.cpu(), ranks.idx.cpu(), ranks.weights.cpu()))


class Rounds:
    """An exchange whose tokens change between calls, in the same memory."""

    def __init__(self, world, *sizes, seeds=3, **options):
        self.exchange = VirtualExchange(world, *sizes, **options)
        self.arena, self.run = self.exchange.arena, self.exchange.run
        self._given = [self.exchange.tokens(seed) for seed in range(seeds)]
        self._wanted = [self.exchange.sums(*given).to(self.arena.device) for given in self._given]
        self._given = [[each.to(self.arena.device) for each in given] for given in self._given]

    def put(self, seed):
        self.exchange.put(*self._given[seed])
        self.exchange.out.fill_(7)

    def count_wrong(self, seed):
        """Elements of the sums, as a tensor on their device."""
        return count_different(self.exchange.out, self._wanted[seed])


def check_missing_rank(world, missing, device="cpu", timeout=1.0):
    """A rank that never comes is named by the others within the deadline."""
    ranks = VirtualExchange(world, device=device, mode="streams")
    ranks.dispatch()
    settle(ranks.arena)
    leave_out(ranks.arena, missing)
    error = failure_of(ranks.arena, lambda: ranks.dispatch(timeout))
    assert tuple(error.peers) == (missing,)
