import itertools

import pytest
import torch

from tcomm import reference
from tcomm.algorithms import REDUCE_OPS
from tcomm.cpu import reduction
from tcomm.cpu.reduction import make_reduction
from tests.test_reference import DTYPES, difference, every_ranks_input

CHUNK = reduction._CHUNK_BYTES


def _reducible(dtype):
    return [op for op in REDUCE_OPS if op != "avg" or dtype.is_floating_point]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_operation_has_the_bits_of_the_reference(world_size, dtype):
    for op, shape in itertools.product(_reducible(dtype), [(), (0,), (1,), (3, 5), (1001,)]):
        sources = every_ranks_input(3, world_size, shape, dtype, special=True)
        out = torch.empty(shape, dtype=dtype)
        make_reduction(op, dtype, world_size, out.numel())(sources, out)
        assert difference(out, reference.all_reduce(sources, op)[0], op) == "", (op, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_long_tensors_go_in_chunks_without_a_seam(dtype):
    step = CHUNK // max(dtype.itemsize, 4)
    for numel in (step - 1, step, step + 1, 2 * step + 7):
        sources = every_ranks_input(numel, 3, (numel,), dtype)
        out = torch.empty(numel, dtype=dtype)
        make_reduction("sum", dtype, 3, numel)(sources, out)
        assert difference(out, reference.all_reduce(sources)[0]) == "", numel


@pytest.mark.parametrize(("world_size", "place"), [(2, 0), (2, 1), (3, 0), (5, 0)])
def test_the_result_may_replace_a_source_that_it_is_allowed_to(world_size, place):
    for dtype, op in itertools.product((torch.float32, torch.float16), REDUCE_OPS):
        sources = every_ranks_input(9, world_size, (777,), dtype)
        expected = reference.all_reduce(sources, op)[0]
        make_reduction(op, dtype, world_size, 777)(sources, sources[place])
        assert difference(sources[place], expected, op) == "", (op, dtype)


def test_sources_are_left_as_they_are():
    for op, world_size in itertools.product(REDUCE_OPS, (2, 3)):
        sources = every_ranks_input(4, world_size, (50,), torch.bfloat16)
        before = [source.clone() for source in sources]
        make_reduction(op, torch.bfloat16, world_size, 50)(sources, torch.empty(50, dtype=torch.bfloat16))
        assert all(torch.equal(now, then) for now, then in zip(sources, before, strict=True))


def test_a_reduction_keeps_nothing_from_the_call_before():
    reduce = make_reduction("avg", torch.float16, 3, 64)
    for seed in range(4):
        sources = every_ranks_input(seed, 3, (64,), torch.float16)
        out = torch.empty(64, dtype=torch.float16)
        reduce(sources, out)
        assert difference(out, reference.all_reduce(sources, "avg")[0], "avg") == "", seed
