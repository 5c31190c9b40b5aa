import itertools
import weakref

import numpy as np
import pytest
import torch

from tcomm import reference
from tcomm.algorithms import REDUCE_OPS, combine_of
from tcomm.cpu import reduction
from tcomm.cpu.reduction import Reduction, room_of
from tcomm.memory.base import Staging, SymmetricBuffer
from tcomm.memory.layout import StagingLayout
from tests.test_reference import DTYPES, INT_BITS, difference, every_ranks_input

CHUNK = reduction._CHUNK_BYTES
LONG = 65536 + 64
"""Elements of several chunks."""


def _reduction(op, dtype, world_size, numel):
    """With room of its own."""
    return Reduction(op, dtype, world_size, numel, torch.empty(CHUNK, dtype=torch.uint8))


def _reducible(dtype):
    return [op for op in REDUCE_OPS if op != "avg" or dtype.is_floating_point]


def _reduce(op, sources, out):
    """Into `out`, straight from the sources."""
    _reduction(op, out.dtype, len(sources), out.numel()).over(sources)(torch.empty(0), out)
    return out


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_operation_has_the_bits_of_the_reference(world_size, dtype):
    for op, shape in itertools.product(_reducible(dtype), [(), (0,), (1,), (3, 5), (1001,), (64, 192)]):
        sources = every_ranks_input(3, world_size, shape, dtype, special=True)
        out = _reduce(op, sources, torch.empty(shape, dtype=dtype))
        assert difference(out, reference.all_reduce(sources, op)[0], op) == "", (op, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_long_tensors_go_in_chunks_without_a_seam(dtype):
    step = CHUNK // max(dtype.itemsize, 4)
    for numel in (step - 1, step, step + 1, 2 * step, 2 * step + 7, 2 * step + 64):
        sources = every_ranks_input(numel, 3, (numel,), dtype)
        out = _reduce("sum", sources, torch.empty(numel, dtype=dtype))
        assert difference(out, reference.all_reduce(sources)[0]) == "", numel


def _any_bits(seed, world_size, numel, dtype):
    """Of every rank: many NaN with bits of their own, infinities and zeros of both signs."""
    generator, ints = torch.Generator().manual_seed(seed), INT_BITS[dtype.itemsize]
    info = torch.iinfo(ints)
    bits = torch.randint(info.min, info.max, (world_size, numel), generator=generator, dtype=ints)
    exponent = torch.full((), float("inf"), dtype=dtype).view(ints)
    kinds = torch.randint(0, 4, bits.shape, generator=generator)
    bits = torch.where(kinds == 0, bits | exponent, bits)
    bits = torch.where(kinds == 1, bits & (info.min | exponent), bits)
    return list(torch.where(bits.eq(exponent & bits) & (kinds == 2), bits & info.min, bits).view(dtype))


def _by_torch(op, sources):
    """One after another, as torch alone would."""
    combine, acc = combine_of(op), sources[0]
    for source in sources[1:]:
        acc = combine(acc, source)
    return acc * (1.0 / len(sources)) if op == "avg" else acc


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_the_caller_has_told_numpy_of_infinities_stays(world_size):
    sources = [torch.tensor([float("inf")]), torch.tensor([float("-inf")]), torch.zeros(1)][:world_size]
    with np.errstate(all="raise"):
        before = np.geterr()
        assert _reduce("sum", sources, torch.empty(1)).isnan()
        assert np.geterr() == before
        with pytest.raises(FloatingPointError):
            np.add(sources[0].numpy(), sources[1].numpy())


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_infinities_and_zeros_are_what_torch_gives_and_warn_of_nothing(world_size, dtype, recwarn):
    for op, numel in itertools.product(REDUCE_OPS, (LONG, LONG + 5)):
        sources = _any_bits(numel, world_size, numel, dtype)
        out = _reduce(op, sources, torch.empty(numel, dtype=dtype))
        assert difference(out, _by_torch(op, sources), op) == "", (op, numel)
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_which_nan_is_kept_does_not_depend_on_where_the_memory_is(world_size):
    for op, numel in itertools.product(REDUCE_OPS, (1, 33, LONG + 5)):
        sources = _any_bits(numel, world_size, numel, torch.float32)
        seen = set()
        for place in range(4):
            memory = torch.empty(world_size + 1, numel + 7)
            moved = [row[place : place + numel] for row in memory]
            for row, source in zip(moved, sources, strict=False):
                row.copy_(source)
            out = _reduce(op, moved[:-1], moved[-1])
            seen.add(out.numpy().tobytes())
        assert len(seen) == 1, (op, numel)


@pytest.mark.parametrize(("world_size", "numel"), [(2, 777), (3, 777), (5, 777), (2, LONG), (4, LONG)])
def test_the_result_may_replace_any_of_the_sources(world_size, numel):
    cases = itertools.product((torch.float32, torch.float16), REDUCE_OPS, range(world_size))
    for dtype, op, place in cases:
        sources = every_ranks_input(9, world_size, (numel,), dtype)
        expected = reference.all_reduce(sources, op)[0]
        out = _reduce(op, sources, sources[place])
        assert difference(out, expected, op) == "", (op, dtype, place)


def test_sources_are_left_as_they_are():
    kinds = [(torch.bfloat16, 50), (torch.float32, LONG)]
    for op, world_size, (dtype, numel) in itertools.product(REDUCE_OPS, (2, 3), kinds):
        sources = every_ranks_input(4, world_size, (numel,), dtype)
        before = [source.clone() for source in sources]
        _reduce(op, sources, torch.empty(numel, dtype=dtype))
        assert all(torch.equal(now, then) for now, then in zip(sources, before, strict=True))


@pytest.mark.parametrize(("dtype", "numel"), [(torch.float16, 64), (torch.float32, LONG)])
def test_a_reduction_keeps_nothing_from_the_call_before(dtype, numel):
    memory = torch.empty(3, numel, dtype=dtype)
    reduce = _reduction("avg", dtype, 3, numel).over(list(memory))
    for seed in range(4):
        sources = every_ranks_input(seed, 3, (numel,), dtype)
        memory.copy_(torch.stack(sources))
        out = torch.empty(numel, dtype=dtype)
        reduce(out, out)
        assert difference(out, reference.all_reduce(sources, "avg")[0], "avg") == "", seed


@pytest.mark.parametrize("numel", [48, LONG])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_rank_reads_its_own_and_writes_the_result_where_it_was_told(rank, numel):
    for op, dtype in (("sum", torch.float32), ("max", torch.int64), ("avg", torch.bfloat16)):
        sources = every_ranks_input(rank, 4, (numel,), dtype)
        expected = reference.all_reduce(sources, op)[0]
        x = torch.full((2, numel), 77).to(dtype)
        x.view(-1)[7 : 7 + numel] = sources[rank]
        sources[rank] = torch.full((numel,), 99).to(dtype)
        reducer = _reduction(op, dtype, 4, numel)
        band = torch.full((3, numel), 77).to(dtype)
        reducer.over(sources, (rank, 7), 11)(x, band)
        flat = band.view(-1)
        assert difference(flat[11 : 11 + numel].clone(), expected, op) == "", op
        assert torch.cat([flat[:11], flat[11 + numel :]]).eq(77).all(), op
        elsewhere = torch.empty(numel, dtype=dtype)
        reducer.over(sources, (rank, 7), elsewhere)(x, band)
        assert difference(elsewhere, expected, op) == "", op
        assert sources[rank].eq(99).all(), op
        reducer.over(sources, (rank, 7), sources[rank])(x, band.fill_(77))
        assert difference(sources[rank], expected, op) == "", op
        assert band.eq(77).all(), op


@pytest.mark.parametrize(
    ("dtype", "numel"), [(torch.float32, 48), (torch.float32, LONG), (torch.float16, LONG)]
)
def test_each_call_reads_and_writes_the_tensors_that_it_is_given(dtype, numel):
    reduce = _reduction("sum", dtype, 3, numel).over(list(torch.ones(3, numel, dtype=dtype)), (1, 3), 5)
    count = 20
    xs, outs = torch.zeros(count, numel + 3, dtype=dtype), torch.zeros(count, numel + 5, dtype=dtype)
    for turn in range(2):
        for number in range(count):
            reduce(xs[number].fill_(number + turn), outs[number])
        expected = torch.arange(count).add(2 + turn).to(dtype).view(-1, 1)
        assert outs[:, 5:].eq(expected).all(), turn
        assert outs[:, :5].eq(0).all(), turn


def test_tensors_that_were_given_are_not_kept():
    reduce = _reduction("sum", torch.float32, 3, 64).over(list(torch.ones(3, 64)), (1, 0), 0)
    x, out = torch.ones(64), torch.empty(64)
    reduce(x, out)
    given = [weakref.ref(x.untyped_storage()), weakref.ref(out.untyped_storage())]
    owners = [weakref.ref(x), weakref.ref(out)]
    del x, out
    assert [ref() for ref in owners + given] == [None] * 4


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("numel", [48, LONG])
def test_what_is_not_said_is_staged_and_goes_to_out(numel, world_size):
    sources = every_ranks_input(1, world_size, (numel,), torch.float32)
    expected, x = reference.all_reduce(sources)[0], torch.full((2, numel), 77.0)
    reducer = _reduction("sum", torch.float32, world_size, numel)
    for shape, first in (((2, numel), 11), ((2, numel // 2), 0), ((numel,), 0)):
        out = torch.full(shape, 77.0)
        reducer.over(sources, None, first)(x, out)
        flat = out.view(-1)
        assert difference(flat[first : first + numel].clone(), expected) == "", shape
        assert torch.cat([flat[:first], flat[first + numel :]]).eq(77).all(), shape
    result, out = torch.empty(numel), torch.full((numel,), 77.0)
    reducer.over(sources, None, result)(x, out)
    assert difference(result, expected) == ""
    assert out.eq(77).all()
    x.view(-1)[7 : 7 + numel] = sources[1]
    sources[1] = torch.full((numel,), 99.0)
    reducer.over(sources, (1, 7))(x, out)
    assert difference(out, expected) == ""


@pytest.mark.parametrize(
    ("op", "world_size", "at_once"),
    [("sum", 1, True), ("sum", 2, True), ("avg", 2, False), ("max", 3, False)],
)
def test_two_ranks_go_at_once_and_more_by_way_of_a_cache(op, world_size, at_once):
    reducer = _reduction(op, torch.float32, world_size, LONG)
    assert (len(reducer._ranges) == 1) is at_once
    assert reducer._room.nbytes == (0 if at_once else CHUNK)


@pytest.mark.parametrize("numel", [64, LONG])
def test_tensors_that_could_have_gradients_are_read_and_written(numel):
    reduce = _reduction("sum", torch.float32, 3, numel).over(list(torch.ones(3, numel)), (1, 0), 0)
    with torch.no_grad():
        x, out = torch.nn.Parameter(torch.full((numel,), 5.0)), torch.empty(numel)
        reduce(x, out)
        assert out.eq(7.0).all()
    with torch.inference_mode():
        made = torch.empty(numel)
        reduce(torch.full((numel,), 6.0), made)
        assert made.eq(8.0).all()


@pytest.mark.parametrize("op", ["sum", "max"])
def test_tensors_that_came_in_inference_mode_are_written_outside_of_it(op):
    reduce = _reduction(op, torch.float32, 3, LONG).over(list(torch.ones(3, LONG)), (1, 0), 0)
    x, out = torch.full((LONG,), 5.0), torch.empty(LONG)
    with torch.inference_mode():
        reduce(x, out)
    reduce(x.fill_(6.0), out)
    assert out.eq(8.0 if op == "sum" else 6.0).all()


def test_plans_of_one_staging_share_their_room_and_others_do_not():
    def staging():
        return Staging(
            SymmetricBuffer(0, [torch.zeros(1 << 16, dtype=torch.uint8)]), StagingLayout(1 << 16, 1)
        )

    one, other = staging(), staging()
    with torch.device("meta"):
        rooms = [room_of(one), room_of(one), room_of(other)]
    assert len({room.data_ptr() for room in rooms}) == 2
    assert rooms[0] is rooms[1]
    reduction = Reduction("sum", torch.bfloat16, 3, LONG, rooms[0])
    assert reduction._room.data_ptr() == rooms[0].data_ptr()
    gone = weakref.ref(one)
    del one
    assert gone() is None
