import itertools
import random
import time

import pytest
import torch

from tcomm import reference
from tcomm.cpu.all_reduce import make_plan
from tcomm.memory.arena import open_arena
from tests.kernels.test_all_reduce import bytes_written_past, capacity, delay_at_random, poison, use_tiles
from tests.kernels.test_reduce_scatter import KINDS
from tests.kernels.test_tiles import GIB, allocated, sparse_bytes, sparse_staging
from tests.test_algorithms import CPU, TRITON, description, mistake, reduce_by, supported
from tests.test_reference import difference, every_ranks_input

LONG_DTYPES = [torch.float32, torch.bfloat16, torch.int64]
SHAPES = [(0,), (1,), (2,), (7,), (127,), (1000,), (3, 0, 5), (2, 3, 11), (65536 + 1,), ()]


def _numbers_of_the_docstrings(member):
    arena = member.arena()
    x = torch.tensor([[1.0, 2.0], [10.0, 20.0]][member.rank])
    return [reduce_by(name, x, arena).tolist() for name in CPU]


def test_the_examples_of_the_docstrings(on_ranks):
    assert on_ranks(2, _numbers_of_the_docstrings) == [[[11.0, 22.0]] * 3] * 2


def _bits(member, numel, kinds):
    arena = member.arena()
    poison(member, arena, "bits")
    cases = [(name, op, dtype) for name in CPU for op, dtype in kinds or supported(name)]
    found = [
        mistake(member, arena, seed, name, op, dtype, (numel,), special=seed % 2 == 0, in_place=seed % 3 == 0)
        for seed, (name, op, dtype) in enumerate(cases)
    ]
    assert len(cases) == len(CPU) * (len(kinds) or 4 * 4 + 2 * 3)
    assert not any(found), "\n".join(filter(None, found))


@pytest.mark.parametrize(
    ("world_size", "kinds"), [(1, ()), (2, ()), (3, ()), (4, ()), (6, KINDS), (8, KINDS), (16, KINDS[:3])]
)
def test_every_operation_and_dtype_has_the_bits_of_the_reference(on_ranks, world_size, kinds):
    on_ranks(world_size, _bits, 515, kinds)


def _odd_sizes(member):
    arena = member.arena()
    cases = itertools.product(CPU, SHAPES, [torch.float32, torch.float16], [False, True])
    found = [
        mistake(member, arena, seed, name, "sum", dtype, shape, in_place=in_place)
        for seed, (name, shape, dtype, in_place) in enumerate(cases)
    ]
    assert not any(found), "\n".join(filter(None, found))


@pytest.mark.parametrize("world_size", [2, 3])
def test_odd_and_empty_and_0d_sizes(on_ranks, world_size):
    on_ranks(world_size, _odd_sizes)


def _guard(member):
    assert bytes_written_past(member, CPU) == []


@pytest.mark.parametrize("world_size", [2, 3])
def test_nothing_is_written_around_the_output(on_ranks, world_size):
    on_ranks(world_size, _guard)


def _long_views(member):
    """Long messages between views that begin in the middle of memory, in place too."""
    arena, world, found = member.arena(), member.world_size, []
    for seed, (name, numel, dtype) in enumerate(itertools.product(CPU, [40_000, 40_001], LONG_DTYPES)):
        inputs = every_ranks_input(seed, world, (numel,), dtype)
        expected = reference.all_reduce(inputs)[0]
        band = torch.full((2, numel + 100), 77).to(dtype)
        x, out = band[0, 33 : 33 + numel], band[1, 51 : 51 + numel]
        for result in (out, x):
            x.copy_(inputs[member.rank])
            reduce_by(name, x, arena, "sum", result)
            found.append(difference(result.clone(), expected))
            rest = [band[0, :33], band[0, 33 + numel :], band[1, :51], band[1, 51 + numel :]]
            if not torch.cat(rest).eq(77).all() or (result is out and difference(x, inputs[member.rank])):
                found.append(f"{name} {numel} {dtype}: written elsewhere")
    assert not any(found), "\n".join(filter(None, found))


@pytest.mark.parametrize("world_size", [2, 3])
def test_long_messages_lie_anywhere_in_memory(on_ranks, world_size):
    on_ranks(world_size, _long_views)


def _larger_than_the_staging(member):
    arena = member.arena(staging_bytes=64 * 1024)
    layout, found = arena.staging.layout, []
    for seed, (name, dtype) in enumerate(itertools.product(CPU, [torch.float32, torch.bfloat16])):
        step = capacity(name, layout) // 128 * 128 // dtype.itemsize
        for in_place, shape in ((False, (3 * step + 5,)), (True, (4, step)), (False, (step + 1,))):
            found.append(mistake(member, arena, seed, name, "avg", dtype, shape, in_place=in_place))
    assert not any(found), "\n".join(filter(None, found))


@pytest.mark.parametrize("world_size", [2, 3])
def test_messages_larger_than_the_staging(on_ranks, world_size):
    on_ranks(world_size, _larger_than_the_staging)


def _pieces_of_the_table(member):
    arena, found = member.arena(), []
    for seed, (name, piece) in enumerate(itertools.product(CPU, [128, 1000, 4096, 1 << 30])):
        found.append(mistake(member, arena, seed, name, shape=(3001,), piece_nbytes=piece))
    assert not any(found), "\n".join(filter(None, found))


def test_pieces_of_any_size_give_one_result(on_ranks):
    on_ranks(3, _pieces_of_the_table)


def _reused(member, name):
    """One plan, many calls: both parities, fresh data, poison in between, a rank that is late."""
    arena, wrong = member.arena(), []
    x = torch.empty(333)
    call = description(name, x, "sum")
    plan = make_plan(name.partition(":")[2], arena, call, "sum", x.dtype, x.shape, 0)
    for seed in range(50):
        if seed % 10 == 0:
            poison(member, arena, str(seed))
        if seed % 7 == member.rank:
            time.sleep(0.003)
        inputs = every_ranks_input(seed, member.world_size, (333,), torch.float32)
        plan(x.copy_(inputs[member.rank]), x, 20.0)
        wrong.append(difference(x, reference.all_reduce(inputs)[0]))
    assert not any(wrong), wrong


@pytest.mark.parametrize(("name", "world_size"), [*itertools.product(CPU, [2]), (CPU[2], 4)])
def test_one_plan_serves_fifty_calls(on_ranks, name, world_size):
    on_ranks(world_size, _reused, name)


def _mixed(member, names, num_calls):
    use_tiles(512)
    with pytest.MonkeyPatch.context() as monkeypatch:
        arena = member.arena(staging_bytes=128 * 1024)
        delay_at_random(member.rank, monkeypatch)
        same, found = random.Random(11), []
        for seed in range(num_calls):
            name = same.choice(names)
            op, dtype = same.choice(supported(name))
            shape = same.choice([(), (0,), (1,), (300,), (3, 301)])
            in_place = same.random() < 0.5
            found.append(mistake(member, arena, seed, name, op, dtype, shape, in_place=in_place))
    assert not any(found), "\n".join(filter(None, found))


@pytest.mark.parametrize("world_size", [2, 4])
def test_shapes_dtypes_and_algorithms_alternate_with_random_delays(on_ranks, world_size):
    on_ranks(world_size, _mixed, CPU, 80)


@pytest.mark.parametrize("world_size", [2, 3])
def test_kernels_and_plans_alternate_on_one_arena(on_ranks, world_size):
    on_ranks(world_size, _mixed, (*CPU, *TRITON), 24)


def _both_engines(member):
    use_tiles(8192)
    arena = member.arena()
    for seed, (dtype, op) in enumerate(itertools.product([torch.float32, torch.bfloat16], ["avg", "max"])):
        inputs = every_ranks_input(seed, member.world_size, (777,), dtype, special=True)
        results = {name: reduce_by(name, inputs[member.rank], arena, op) for name in (*CPU, *TRITON)}
        for name, result in results.items():
            assert difference(result, results[CPU[0]], op) == "", (name, dtype, op)
    return True


def test_every_algorithm_of_both_engines_gives_the_same_bits(on_ranks):
    on_ranks(3, _both_engines)


def _bits_of_every_rank(member):
    arena, seen = member.arena(), []
    for seed, (name, dtype) in enumerate(itertools.product(CPU, [torch.float32, torch.float16])):
        # Longer than what goes by torch alone.
        numel = 501 if seed % 2 else 40_000
        x = every_ranks_input(seed, member.world_size, (numel,), dtype, special=True)[member.rank]
        seen.append(bytes(reduce_by(name, x, arena, "avg").view(torch.uint8).numpy()))
    return seen


def test_every_rank_gets_the_same_bits_nan_included(on_ranks):
    results = on_ranks(4, _bits_of_every_rank)
    assert results == [results[0]] * 4


def _past_two_gib(member, directory):
    arena = member.arena()
    sparse_staging(member, arena, directory, 6 * GIB)
    assert arena.staging.layout.half(1) > 1 << 31
    found = [mistake(member, arena, seed, name, shape=(500,)) for name in CPU for seed in (0, 1)]
    whole = sparse_bytes(directory, f"input{member.rank}", 2 * GIB + 8192).view(torch.float32)
    for name in CPU:
        x = whole[-1001:-1].fill_(member.rank + 1.0)
        assert reduce_by(name, x, arena, out=x).eq(3.0).all(), name
    assert not any(found), "\n".join(filter(None, found))


def test_offsets_past_two_gib(on_ranks, tmp_path):
    on_ranks(2, _past_two_gib, str(tmp_path))
    assert allocated(tmp_path) < 1 << 20


def _without_staging(member):
    arena = open_arena("bare", member.exchange("bare"), "/dev/shm", 1, 20.0)
    with pytest.raises(AssertionError, match="the arena has no staging"):
        reduce_by("cpu:two_shot", torch.zeros(3), arena)
    arena.close("done")


def test_a_plan_needs_staging(on_ranks):
    on_ranks(1, _without_staging)
