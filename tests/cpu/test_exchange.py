import itertools
import random

import pytest
import torch

from tcomm.cpu import exchange
from tcomm.cpu.exchange import make_exchange_plan
from tcomm.parts import exchange_parts, gather_parts
from tcomm.signature import CallDescription
from tests.kernels.test_all_reduce import delay_at_random, poison, use_tiles
from tests.moves import (
    CPU,
    MOVED_DTYPES,
    TRITON,
    bits,
    every,
    exchange_by,
    mistakes_of_moves,
    moves,
    random_inputs,
)

LONG = 20_000
"""Elements of which a part is more than SHORT_BYTES in every type but the smallest."""


def _every_move(member, dtypes, unit):
    arena = member.arena(staging_bytes=8 << 20)
    poison(member, arena, "moves")
    found = [
        mistakes_of_moves(member, arena, seed, name, dtype, unit)
        for seed, (name, dtype) in every(CPU, dtypes)
    ]
    assert not any(found), "\n".join(itertools.chain(*found))


@pytest.mark.parametrize(("world_size", "unit"), [(2, 5), (3, 5), (4, 5), (2, LONG), (3, LONG)])
def test_every_move_of_every_dtype_is_the_reference(on_ranks, world_size, unit):
    on_ranks(world_size, _every_move, MOVED_DTYPES, unit)


@pytest.mark.parametrize("world_size", [1, 8, 16])
def test_worlds_of_other_sizes(on_ranks, world_size):
    on_ranks(world_size, _every_move, MOVED_DTYPES[4:6], 7)


def _pieces(member):
    arena = member.arena(staging_bytes=64 * 1024)
    found = []
    for seed, (name, (unit, piece)) in every(CPU, [(LONG, 0), (LONG, 8192), (300, 256), (3, 128)]):
        found += mistakes_of_moves(member, arena, seed, name, torch.int64, unit, piece)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("world_size", [2, 3])
def test_parts_longer_than_the_staging_and_than_a_piece(on_ranks, world_size):
    on_ranks(world_size, _pieces)


def _again_and_again(member, name):
    """One plan, used again with other data in other places."""
    arena = member.arena()
    for what, sizes, parts_of, meaning in moves(member.world_size, 9):
        call = CallDescription("exchange", what, algorithm=name)
        plan = make_exchange_plan(name.partition(":")[2], arena, call, parts_of(member.rank), 4)
        for seed in range(20):
            inputs = random_inputs(seed, sizes, torch.float32)
            expected = meaning(inputs)[member.rank]
            out = torch.full((0 if expected is None else expected.numel(),), -1.0)
            plan(inputs[member.rank], out, 20.0)
            assert expected is None or torch.equal(out, expected), (what, seed)


@pytest.mark.parametrize("name", CPU)
def test_a_plan_used_twenty_times_with_changing_data(on_ranks, name):
    on_ranks(3, _again_and_again, name)


def _mixed(member):
    use_tiles(32)
    with pytest.MonkeyPatch.context() as monkeypatch:
        arena = member.arena(staging_bytes=128 * 1024)
        delay_at_random(member.rank, monkeypatch)
        same, found = random.Random(3), []
        for seed in range(40):
            name = same.choice(CPU if seed % 4 else TRITON)
            dtype, wanted = (
                same.choice(MOVED_DTYPES),
                same.choice(["even", "all_to_all", "broadcast", "scatter"]),
            )
            found += mistakes_of_moves(
                member, arena, seed, name, dtype, same.choice([1, 7, 40]), wanted=wanted
            )
    assert not found, "\n".join(found)


@pytest.mark.parametrize("world_size", [2, 3])
def test_both_engines_alternate_with_random_delays(on_ranks, world_size):
    on_ranks(world_size, _mixed)


def _in_place(member, numel):
    arena, world, rank = member.arena(), member.world_size, member.rank
    for name in CPU:
        x = torch.arange(world * numel) + 10**6 * rank
        exchange_by(name, x, x, arena, exchange_parts([[numel] * world] * world, rank))
        wanted = [torch.arange(numel) + 10**6 * source + numel * rank for source in range(world)]
        assert torch.equal(x, torch.cat(wanted)), name


@pytest.mark.parametrize("numel", [3, LONG])
def test_equal_parts_may_be_exchanged_in_place(on_ranks, numel):
    on_ranks(3, _in_place, numel)


def _nothing_is_copied_onto_itself(member):
    """A part that is in its place already is not touched: the root of a broadcast in place."""
    arena, copied = member.arena(), []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(exchange, "make_move", lambda *_: lambda *args: copied.append(args))
        for name in CPU:
            x = torch.arange(6)
            exchange_by(name, x, x, arena, gather_parts([6 if r == 0 else 0 for r in range(2)], member.rank))
            assert torch.equal(bits(x), bits(torch.arange(6)))
    return len(copied)


def test_a_part_in_its_place_is_left_alone(on_ranks):
    assert on_ranks(2, _nothing_is_copied_onto_itself) == [0, 0]
