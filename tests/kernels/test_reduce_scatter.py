import functools
import itertools
import random

import pytest
import torch

from tcomm.errors import ConfigError
from tcomm.kernels import reduce_scatter
from tcomm.kernels.reduce_scatter import LAUNCHERS
from tcomm.parts import scatter_parts
from tests.kernels.test_all_reduce import delay_at_random, poison, use_tiles
from tests.moves import TRITON, every, mistakes_of_reductions
from tests.test_reference import every_ranks_input

KINDS = (
    ("sum", torch.float32),
    ("avg", torch.bfloat16),
    ("max", torch.float16),
    ("min", torch.int64),
    ("avg", torch.float64),
    ("sum", torch.int32),
)


def random_data(seed, world_size, dtype, numel):
    return every_ranks_input(seed, world_size, (numel,), dtype, special=seed % 2 == 0)


def _numbers_of_the_docstrings(member):
    arena = member.arena()
    results = []
    for launch in LAUNCHERS.values():
        out = torch.zeros(1)
        x = torch.tensor([[1.0, 2.0], [10.0, 20.0]][member.rank])
        launch(x, out, arena, scatter_parts([1, 1], member.rank))
        results.append(out.tolist())
    return results


def test_the_examples_of_the_docstrings(on_ranks):
    assert on_ranks(2, _numbers_of_the_docstrings) == [[[11.0]] * 2, [[22.0]] * 2]


def _bits(member, kinds):
    use_tiles(64)
    arena = member.arena()
    poison(member, arena, "bits")
    found = []
    for seed, (name, (op, dtype)) in every(TRITON, kinds):
        inputs_of = functools.partial(random_data, seed, member.world_size, dtype)
        found += mistakes_of_reductions(member, arena, name, inputs_of, op)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("world_size", "kinds"), [(2, KINDS), (3, KINDS[:3]), (4, KINDS[:1])])
def test_every_operation_and_dtype_has_the_bits_of_the_reference(on_ranks, world_size, kinds):
    on_ranks(world_size, _bits, kinds)


def _tiles_and_pieces(member):
    use_tiles(16)
    arena = member.arena(staging_bytes=64 * 1024)
    found = []
    for seed, (name, (unit, piece)) in every(TRITON, [(16, 0), (53, 0), (200, 256)]):
        inputs_of = functools.partial(random_data, seed, member.world_size, torch.float32)
        found += mistakes_of_reductions(member, arena, name, inputs_of, unit=unit, piece_nbytes=piece)
    use_tiles(4096)
    for seed, (name,) in every(TRITON):
        inputs_of = functools.partial(random_data, seed, member.world_size, torch.float32)
        unit = arena.staging.layout.slot_bytes // 4 + 5
        found += mistakes_of_reductions(member, arena, name, inputs_of, unit=unit, wanted="even")
    assert not found, "\n".join(found)


def test_parts_of_many_tiles_and_pieces_and_more_than_the_staging(on_ranks):
    on_ranks(2, _tiles_and_pieces)


def _in_place(member):
    use_tiles(64)
    arena, found = member.arena(), []
    for seed, (name, (op, dtype)) in every(TRITON, KINDS[:3]):
        inputs_of = functools.partial(random_data, seed, member.world_size, dtype)
        found += mistakes_of_reductions(member, arena, name, inputs_of, op, in_place=True, wanted="reduce")
    assert not found, "\n".join(found)


def test_a_root_may_reduce_in_place(on_ranks):
    on_ranks(3, _in_place)


def _mixed(member):
    use_tiles(32)
    with pytest.MonkeyPatch.context() as monkeypatch:
        arena = member.arena(staging_bytes=128 * 1024)
        delay_at_random(member.rank, monkeypatch, reduce_scatter)
        same, found = random.Random(11), []
        for seed in range(12):
            name, (op, dtype) = same.choice(TRITON), same.choice(KINDS)
            inputs_of = functools.partial(random_data, seed, member.world_size, dtype)
            wanted = same.choice(["even", "uneven", "reduce"])
            found += mistakes_of_reductions(
                member, arena, name, inputs_of, op, same.choice([1, 7, 40]), wanted=wanted
            )
    assert not found, "\n".join(found)


@pytest.mark.parametrize("world_size", [2, 3])
def test_kinds_sizes_and_algorithms_alternate_with_random_delays(on_ranks, world_size):
    on_ranks(world_size, _mixed)


BAD = [
    (torch.float32, "mean", "op 'mean' is not among sum, avg, max, min"),
    (
        torch.int32,
        "avg",
        "the average of torch.int32 is not a torch.int32; use sum, or a floating-point tensor",
    ),
    (torch.uint8, "sum", "no kernel reduces torch.uint8"),
]


def _refuses_and_goes_on(member):
    use_tiles(64)
    arena = member.arena()
    if member.rank == 0:
        for launch, (dtype, op, message) in itertools.product(LAUNCHERS.values(), BAD):
            x, out = torch.zeros(4, dtype=dtype), torch.zeros(2, dtype=dtype)
            with pytest.raises(ConfigError) as caught:
                launch(x, out, arena, scatter_parts([2, 2], 0), op)
            assert str(caught.value) == message
    inputs_of = functools.partial(random_data, 5, member.world_size, torch.float32)
    found = [mistakes_of_reductions(member, arena, name, inputs_of) for name in TRITON]
    assert not any(found), found


def test_a_bad_argument_on_one_rank_sends_nothing(on_ranks):
    on_ranks(2, _refuses_and_goes_on)
