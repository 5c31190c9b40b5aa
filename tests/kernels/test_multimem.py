import functools
import random

import pytest
import torch

from tcomm.errors import CapabilityError, ConfigError
from tcomm.kernels import launch, multimem
from tcomm.kernels.multimem import LAUNCHERS
from tcomm.memory.arena import open_arena
from tcomm.memory.layout import cut
from tcomm.memory.virtual import VirtualArena
from tcomm.parts import exchange_parts, gather_parts, scatter_parts
from tests.kernels.switch import use_switch
from tests.kernels.test_all_reduce import delay_at_random, poison, use_tiles
from tests.moves import MOVED_DTYPES, mistakes_of_moves, mistakes_of_reductions
from tests.test_algorithms import mistake
from tests.test_reference import every_ranks_input

ALL_REDUCE = tuple(f"triton:{name}" for name in LAUNCHERS["all_reduce"])
KINDS = (
    ("sum", torch.float32),
    ("avg", torch.float32),
    ("sum", torch.float16),
    ("sum", torch.bfloat16),
)
SIZES = (0, 1, 8, 129, 203)


def _numbers_of_the_docstrings(member):
    arena = member.arena()
    use_switch(arena)
    x = torch.tensor([[1.0, 2.0], [10.0, 20.0]][member.rank])
    sums = [launcher(x, arena).tolist() for launcher in LAUNCHERS["all_reduce"].values()]
    whole, part = torch.zeros(4), torch.zeros(1)
    multimem.multimem_all_gather(x, whole, arena, gather_parts([2, 2], member.rank))
    multimem.multimem_reduce_scatter(x, part, arena, scatter_parts([1, 1], member.rank))
    return sums, whole.tolist(), part.tolist()


def test_the_examples_of_the_docstrings(on_ranks):
    sums, whole = [[11.0, 22.0]] * 2, [1.0, 2.0, 10.0, 20.0]
    assert on_ranks(2, _numbers_of_the_docstrings) == [(sums, whole, [11.0]), (sums, whole, [22.0])]


def _all_reduces(member, special):
    use_tiles(64)
    arena = member.arena()
    switch = use_switch(arena)
    poison(member, arena, "all-reduces")
    cases = [(name, op, dtype, n) for name in ALL_REDUCE for op, dtype in KINDS for n in SIZES]
    found = [
        mistake(member, arena, seed, name, op, dtype, (numel,), in_place=seed % 3 == 0, special=special)
        for seed, (name, op, dtype, numel) in enumerate(cases)
    ]
    assert not any(found), "\n".join(filter(None, found))
    assert switch.sums > 0 < switch.stores
    assert switch.fences > 0


@pytest.mark.parametrize(("world_size", "special"), [(1, False), (2, True), (3, False)])
def test_all_reduces_of_a_switch_that_adds_in_rank_order_are_the_reference(on_ranks, world_size, special):
    on_ranks(world_size, _all_reduces, special)


def _parts(member, dtypes):
    use_tiles(64)
    arena = member.arena(staging_bytes=64 * 1024)
    use_switch(arena)
    poison(member, arena, "parts")
    found = []
    for seed, dtype in enumerate(dtypes):
        # Many pieces of the longest and of the shortest elements.
        for unit, piece in ((5, 0), (133, 256)) if dtype in (dtypes[0], dtypes[-1]) else ((5, 0),):
            for wanted in ("all_gather even", "all_gather nothing"):
                found += mistakes_of_moves(
                    member, arena, seed, "triton:multimem", dtype, unit, piece, wanted=wanted
                )
    for seed, (op, dtype) in enumerate(KINDS):
        for unit, piece in ((5, 0), (133, 256)) if seed % 3 == 0 else ((5, 0),):
            inputs_of = functools.partial(_inputs, seed, member.world_size, dtype)
            found += mistakes_of_reductions(member, arena, "triton:multimem", inputs_of, op, unit, piece)
    assert not found, "\n".join(found)


def _inputs(seed, world_size, dtype, numel):
    return every_ranks_input(seed, world_size, (numel,), dtype)


@pytest.mark.parametrize(("world_size", "dtypes"), [(2, MOVED_DTYPES), (3, MOVED_DTYPES[2:4])])
def test_parts_are_gathered_and_reduced_as_the_reference_says(on_ranks, world_size, dtypes):
    on_ranks(world_size, _parts, dtypes)


def _mixed(member):
    use_tiles(256)
    with pytest.MonkeyPatch.context() as monkeypatch:
        arena = member.arena(staging_bytes=64 * 1024)
        use_switch(arena)
        delay_at_random(member.rank, monkeypatch, multimem)
        same, found = random.Random(7), []
        verbs = [*ALL_REDUCE, "triton:one_shot_push", "triton:two_shot", "all_gather", "reduce_scatter"]
        for seed in range(24):
            name, numel = same.choice(verbs), same.choice([0, 1, 7, 300, 900])
            op, dtype = same.choice(KINDS)
            if name == "all_gather":
                found += mistakes_of_moves(
                    member, arena, seed, "triton:multimem", dtype, numel, wanted="all_gather even"
                )
            elif name == "reduce_scatter":
                inputs_of = functools.partial(_inputs, seed, member.world_size, dtype)
                found += mistakes_of_reductions(
                    member, arena, "triton:multimem", inputs_of, op, numel, wanted="uneven"
                )
            else:
                found.append(mistake(member, arena, seed, name, op, dtype, (numel,)))
    assert not any(found), "\n".join(filter(None, found))


@pytest.mark.parametrize("world_size", [2, 3])
def test_halves_are_used_again_by_whatever_comes_next(on_ranks, world_size):
    on_ranks(world_size, _mixed)


def _staged(member):
    use_tiles(64)
    arena = member.arena()
    layout = use_switch(arena).staging.layout
    staged = {}
    for name, launcher in LAUNCHERS["all_reduce"].items():
        for numel in (5, 64, 67, 72):
            poison(member, arena, f"{name}/{numel}", 0x11)
            launcher(torch.ones(numel, dtype=torch.bfloat16), arena)
            member.meet(f"{name}/{numel}/done")
            halves = arena.staging.buffer.local[layout.half_offset :].view(2, -1)
            (half,) = [half for half in halves if (half != 0x11).any()]
            staged[name, numel] = half.view(torch.int16)[numel : numel + 16].tolist()
    return staged


def test_staging_is_filled_up_with_zeros_to_16_bytes_and_not_beyond(on_ranks):
    for staged in on_ranks(2, _staged):
        assert len(staged) == 8
        for (name, numel), behind in staged.items():
            zeros = -numel % 8
            assert behind == [0] * zeros + [0x1111] * (16 - zeros), (name, numel)


def _long_messages(member):
    use_tiles(8192)
    arena = member.arena(staging_bytes=64 * 1024)
    switch = use_switch(arena)
    capacity = switch.staging.layout.half_bytes
    numel = 2 * capacity // 4 + 3
    assert len(cut(numel, 4, capacity)) == 3
    found = [mistake(member, arena, seed, name, shape=(numel,)) for seed, name in enumerate(ALL_REDUCE)]
    unit = 2 * switch.staging.layout.slot_bytes // 4 + 3
    found += mistakes_of_moves(member, arena, 7, "triton:multimem", unit=unit, wanted="all_gather even")
    inputs_of = functools.partial(_inputs, 7, member.world_size, torch.float32)
    found += mistakes_of_reductions(member, arena, "triton:multimem", inputs_of, unit=unit, wanted="even")
    assert not any(found), "\n".join(filter(None, found))


def test_what_exceeds_a_half_or_a_slot_goes_in_pieces(on_ranks):
    on_ranks(2, _long_messages)


def _refusal(launcher, *args):
    with pytest.raises((CapabilityError, ConfigError)) as caught:
        launcher(*args)
    return type(caught.value).__name__, str(caught.value)


def _every_launch(arena):
    x, parts = torch.ones(2), gather_parts([1] * arena.world_size, 0)
    yield from ((launcher, x, arena) for launcher in LAUNCHERS["all_reduce"].values())
    yield multimem.multimem_all_gather, x[:1], x, arena, parts
    yield multimem.multimem_reduce_scatter, x, x[:1], arena, scatter_parts([1] * arena.world_size, 0)


def _lacks(member, bare):
    arena = open_arena("bare", member.exchange("bare"), "/dev/shm", 1, 20.0) if bare else member.arena()
    interpreted = {_refusal(*call) for call in _every_launch(arena)}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(launch, "is_interpreted", lambda: False)
        compiled = {_refusal(*call) for call in _every_launch(arena)}
    return interpreted, compiled


INTERPRETED = "multimem instructions need a GPU; kernels are interpreted in this process"
NO_MULTICAST = "the fabric has no multicast for this group: its staging has no such address"
NO_STAGING = "the group has no staging memory yet; call prepare() first"


@pytest.mark.parametrize(("bare", "message"), [(False, NO_MULTICAST), (True, NO_STAGING)])
def test_a_group_without_multicast_is_refused(on_ranks, bare, message):
    for interpreted, compiled in on_ranks(1, _lacks, bare):
        assert interpreted == {("CapabilityError", INTERPRETED)}
        assert compiled == {("CapabilityError", message)}


def test_virtual_ranks_are_refused(monkeypatch):
    arena = VirtualArena(2, torch.device("cpu"), 1 << 16)
    monkeypatch.setattr(launch, "is_interpreted", lambda: False)
    message = "virtual ranks share one device, and multicast reaches each device once"
    assert {_refusal(*call) for call in _every_launch(arena)} == {("CapabilityError", message)}


SUMS = (
    (
        torch.float32,
        "max",
        "multimem gives sum and avg of float32, float16, bfloat16, not max of torch.float32",
    ),
    (torch.int32, "sum", "multimem gives sum and avg of float32, float16, bfloat16, not sum of torch.int32"),
    (
        torch.bfloat16,
        "avg",
        "the switch rounds a sum to torch.bfloat16 before it can be divided: avg would be rounded twice; "
        "use sum, or float32",
    ),
    (
        torch.float16,
        "avg",
        "the switch rounds a sum to torch.float16 before it can be divided: avg would be rounded twice; "
        "use sum, or float32",
    ),
    (torch.float32, "mul", "op 'mul' is not among sum, avg, max, min"),
)


def _arguments(member):
    arena = member.arena()
    use_switch(arena)
    parts, found = scatter_parts([2], 0), []
    for dtype, op, message in SUMS:
        x = torch.ones(2, dtype=dtype)
        refusals = {_refusal(one, x, arena, op)[1] for one in LAUNCHERS["all_reduce"].values()}
        refusals |= {_refusal(multimem.multimem_reduce_scatter, x, x, arena, parts, op)[1]}
        found += [] if refusals == {message} else [(message, refusals)]
    for launcher in LAUNCHERS["all_reduce"].values():
        found += [] if "contiguous" in _refusal(launcher, torch.ones(4)[::2], arena)[1] else [launcher]
    return found


def test_what_the_switch_does_not_reduce_is_refused(on_ranks):
    assert on_ranks(1, _arguments) == [[]]


def _unequal(member):
    arena = member.arena()
    use_switch(arena)
    tables = [
        gather_parts([2, 1], 0),
        gather_parts([2, 2], 0, root=0),
        gather_parts([2, 0], 0),
        exchange_parts([[1, 1], [1, 1]], 0),
    ]
    x = torch.zeros(4)
    return [_refusal(multimem.multimem_all_gather, x, x, arena, parts) for parts in tables]


def test_parts_that_are_not_one_equal_range_of_each_rank_are_refused(on_ranks):
    for refusals in on_ranks(2, _unequal):
        message = "a multimem all-gather takes one range of equal length from each rank, for all ranks; "
        assert all(name == "CapabilityError" and text.startswith(message) for name, text in refusals)
        given = [text.removeprefix(message) for _, text in refusals]
        assert given[0] == "this rank gives [(0, 2), (0, 2)] and gets [(0, 2), (2, 1)] (first, length)"
        assert given[1] == "this rank gives [(0, 2), (0, 0)] and gets [(0, 2), (2, 2)] (first, length)"
