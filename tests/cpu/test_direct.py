import itertools

import pytest
import torch

from tcomm import reference
from tcomm.algorithms import DIRECT_ALGORITHMS, REDUCE_OPS
from tcomm.cpu.direct import make_direct_plan
from tests.kernels.test_all_reduce import delay_at_random, poison
from tests.kernels.test_reduce_scatter import KINDS
from tests.test_algorithms import description, mistake
from tests.test_reference import DTYPES, difference, every_ranks_input

(ALGORITHM,) = DIRECT_ALGORITHMS["all_reduce"]
EVERY_KIND = [(op, dtype) for op in REDUCE_OPS for dtype in DTYPES if not ALGORITHM.refusal(op, dtype)]
GUARD = 64


class _Sums:
    """All-reduces into symmetric tensors that lie behind one another in one region, with guards between."""

    def __init__(self, member, nbytes, name="direct"):
        self.member, self.arena = member, member.arena(name=name)
        self._memory = self.arena.add_region(nbytes, 20.0)
        self._memory.local.fill_(77)
        self._used = GUARD
        member.meet(f"{name}/filled")

    def tensor(self, shape, dtype):
        """The next tensor, at the same place on every rank."""
        numel = torch.Size(shape).numel()
        begin, end = self._used, self._used + numel * dtype.itemsize
        self._used = -(-end // GUARD) * GUARD + GUARD
        return self._memory.local[begin:end].view(dtype).view(shape)

    def plan(self, out, op="sum"):
        name = self.arena.regions.name(out)
        call = description(ALGORITHM.name, out, op)
        return make_direct_plan(self.arena, call, op, out.dtype, out.numel(), self.arena.regions.find(name))

    def mistake(self, seed, op, dtype, shape, in_place):
        """Reduce random data once; empty when the result has the right bits and nothing else changed."""
        inputs = every_ranks_input(seed, self.member.world_size, shape, dtype, special=seed % 2 == 0)
        mine, before = inputs[self.member.rank], self._used
        out = self.tensor(shape, dtype)
        x = out.copy_(mine) if in_place else mine.clone()
        self.plan(out, op)(x, out, 20.0)
        wrong = difference(out, reference.all_reduce(inputs, op)[0], op)
        if not in_place and not wrong and difference(x, mine):
            wrong = "the input was changed"
        end = before + out.numel() * dtype.itemsize
        around = [self._memory.local[before - GUARD : before], self._memory.local[end : self._used]]
        # A peer writes to the guards behind, if at all, before it ends its call.
        if not wrong and any(bool(guard.ne(77).any()) for guard in around):
            wrong = "the guard band was written"
        return f"{op} {dtype} {list(shape)} seed {seed} in place {in_place}: {wrong}" if wrong else ""


def _bits(member, numel, kinds):
    sums = _Sums(member, 2 * len(kinds) * (numel * 8 + 4 * GUARD))
    cases = itertools.product(kinds, [False, True])
    found = [
        sums.mistake(seed, op, dtype, (numel,), in_place)
        for seed, ((op, dtype), in_place) in enumerate(cases)
    ]
    assert not any(found), "\n".join(filter(None, found))


@pytest.mark.parametrize(
    ("world_size", "kinds"), [(2, EVERY_KIND), (3, EVERY_KIND), (4, EVERY_KIND), (6, KINDS), (8, KINDS)]
)
def test_every_operation_and_dtype_has_the_bits_of_the_reference(on_ranks, world_size, kinds):
    assert len(EVERY_KIND) == 4 * 4 + 2 * 3
    on_ranks(world_size, _bits, 515, kinds)


def _odd_sizes(member):
    # A chunk has 32768 elements; the last ranks of a short message reduce nothing.
    shapes = [(1,), (2, 3), (16,), (17,), (3, 11, 5), (member.world_size * 32768 - 1,)]
    shapes += [(member.world_size * 32768 + 1,), (member.world_size * 65536 + 33,)]
    cases = list(itertools.product(shapes, [torch.float32, torch.bfloat16, torch.int64], [False, True]))
    sums = _Sums(member, sum(torch.Size(shape).numel() * 8 + 4 * GUARD for shape, _, _ in cases))
    found = [
        sums.mistake(seed, "sum", dtype, shape, in_place)
        for seed, (shape, dtype, in_place) in enumerate(cases)
    ]
    assert not any(found), "\n".join(filter(None, found))


@pytest.mark.parametrize("world_size", [2, 3])
def test_odd_sizes_and_the_ends_of_chunks(on_ranks, world_size):
    on_ranks(world_size, _odd_sizes)


def _reused(member, monkeypatch_seed):
    with pytest.MonkeyPatch.context() as monkeypatch:
        delay_at_random(monkeypatch_seed + member.rank, monkeypatch)
        sums = _Sums(member, 1 << 20)
        out, short = sums.tensor((5000,), torch.float32), sums.tensor((77,), torch.int32)
        plans = {t.numel(): sums.plan(t) for t in (out, short)}
        for call in range(40):
            for t in (out, short):
                mine = torch.full_like(t, member.rank + call)
                x = t.copy_(mine) if call % 3 == 0 else mine
                plans[t.numel()](x, t, 20.0)
                assert t.eq(sum(range(member.world_size)) + call * member.world_size).all(), call
            wrong = mistake(member, sums.arena, call, "cpu:two_shot", shape=(300,))
            assert not wrong, wrong


@pytest.mark.parametrize("world_size", [2, 4])
def test_forty_calls_on_the_same_memory_between_others_with_random_delays(on_ranks, world_size):
    on_ranks(world_size, _reused, 5)


def _staging_unused(member):
    sums = _Sums(member, 1 << 20)
    poison(member, sums.arena, "unused", 0x5A)
    staging = sums.arena.staging
    halves = staging.buffer.local[staging.layout.half_offset :]
    before = halves.clone()
    out = sums.tensor((70_000,), torch.float32)
    sums.plan(out)(torch.ones(70_000), out, 20.0)
    member.meet("reduced")
    return torch.equal(before, halves)


def test_nothing_is_staged(on_ranks):
    assert on_ranks(3, _staging_unused) == [True] * 3


def _elsewhere(member):
    sums = _Sums(member, 1 << 16)
    out = sums.tensor((10,), torch.float32)
    with pytest.raises(AssertionError, match="not where the ranks agreed"):
        sums.plan(out)(torch.ones(10), torch.ones(10), 20.0)


def test_a_plan_is_for_one_place(on_ranks):
    on_ranks(2, _elsewhere)
