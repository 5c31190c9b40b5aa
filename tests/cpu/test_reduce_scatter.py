import functools
import random

import pytest
import torch

from tests.kernels.test_all_reduce import delay_at_random, poison, use_tiles
from tests.kernels.test_reduce_scatter import KINDS, random_data
from tests.moves import CPU, TRITON, every, mistakes_of_reductions
from tests.test_algorithms import supported

LONG = 20_000


def _bits(member, unit, in_place, kinds=()):
    arena = member.arena(staging_bytes=8 << 20)
    poison(member, arena, "bits")
    found = []
    for seed, (name, (op, dtype)) in every(CPU, kinds or supported("cpu:two_shot")):
        inputs_of = functools.partial(random_data, seed, member.world_size, dtype)
        found += mistakes_of_reductions(member, arena, name, inputs_of, op, unit, in_place=in_place)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("world_size", "unit", "kinds"), [(2, 5, ()), (3, 5, ()), (4, 5, KINDS), (2, LONG, KINDS), (3, LONG, ())]
)
def test_every_operation_and_dtype_has_the_bits_of_the_reference(on_ranks, world_size, unit, kinds):
    on_ranks(world_size, _bits, unit, False, kinds)


@pytest.mark.parametrize(("world_size", "unit"), [(2, 5), (3, LONG)])
def test_a_root_may_reduce_in_place(on_ranks, world_size, unit):
    on_ranks(world_size, _bits, unit, True, KINDS)


@pytest.mark.parametrize("world_size", [1, 16])
def test_worlds_of_other_sizes(on_ranks, world_size):
    on_ranks(world_size, _bits, 7, False, KINDS if world_size == 1 else KINDS[:3])


def _pieces(member):
    arena, found = member.arena(staging_bytes=64 * 1024), []
    for seed, (name, (unit, piece)) in every(CPU, [(LONG, 0), (LONG, 8192), (300, 256), (3, 128)]):
        inputs_of = functools.partial(random_data, seed, member.world_size, torch.bfloat16)
        found += mistakes_of_reductions(member, arena, name, inputs_of, unit=unit, piece_nbytes=piece)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("world_size", [2, 3])
def test_parts_longer_than_the_staging_and_than_a_piece(on_ranks, world_size):
    on_ranks(world_size, _pieces)


def _mixed(member):
    use_tiles(32)
    with pytest.MonkeyPatch.context() as monkeypatch:
        arena = member.arena(staging_bytes=128 * 1024)
        delay_at_random(member.rank, monkeypatch)
        same, found = random.Random(5), []
        for seed in range(40):
            name, (op, dtype) = same.choice(CPU if seed % 4 else TRITON), same.choice(KINDS)
            inputs_of = functools.partial(random_data, seed, member.world_size, dtype)
            unit, wanted = same.choice([1, 7, 40]), same.choice(["even", "uneven", "reduce"])
            found += mistakes_of_reductions(member, arena, name, inputs_of, op, unit, wanted=wanted)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("world_size", [2, 3])
def test_both_engines_alternate_with_random_delays(on_ranks, world_size):
    on_ranks(world_size, _mixed)
