import itertools
import random
import time

import pytest
import torch

from tcomm.errors import CapabilityError, ConfigError
from tcomm.kernels import all_reduce, launch
from tcomm.kernels.all_reduce import LAUNCHERS
from tcomm.memory.arena import open_arena
from tcomm.memory.channel import Channel
from tests.test_algorithms import TRITON, mistake, reduce_by, supported

SIZES = [(0,), (1,), (2,), (7,), (127,), (1000,), (3, 0, 5), (2, 3, 11), ()]


def capacity(name, layout):
    """Bytes that the algorithm takes in one piece."""
    if name.endswith("one_shot_ll"):
        return layout.lane_slot_bytes // 2
    return layout.slot_bytes if name.endswith("one_shot_push") else layout.half_bytes


def use_tiles(numel, num_blocks=2):
    """In a rank's own process: small tiles, which are quick to interpret and many in a message."""
    launch._INTERPRETED_TILE, launch._INTERPRETED_BLOCKS = numel, num_blocks
    launch.tile_numel.cache_clear()


def poison(member, arena, name, byte=0xFF):
    """Fill both halves, where no rank is at work, with bytes that are NaN to every float. **Collective.**"""
    member.meet(f"{name}/before")
    arena.staging.buffer.local[arena.staging.layout.half_offset :] = byte
    member.meet(f"{name}/after")


def _numbers_of_the_docstrings(member):
    arena = member.arena()
    x = torch.tensor([[1.0, 2.0], [10.0, 20.0]][member.rank])
    return [LAUNCHERS[name](x, arena).tolist() for name in LAUNCHERS]


def test_the_examples_of_the_docstrings(on_ranks):
    assert on_ranks(2, _numbers_of_the_docstrings) == [[[11.0, 22.0]] * 4] * 2


def _bits(member, names, numel):
    use_tiles(8192)
    arena = member.arena()
    poison(member, arena, "bits")
    cases = [(name, op, dtype) for name in names for op, dtype in supported(name)]
    found = [
        mistake(member, arena, seed, name, op, dtype, (numel,), special=seed % 2 == 0)
        for seed, (name, op, dtype) in enumerate(cases)
    ]
    assert len(cases) >= 10 * len(names)
    assert not any(found), "\n".join(filter(None, found))


def test_every_operation_and_dtype_has_the_bits_of_the_reference(on_ranks):
    on_ranks(3, _bits, TRITON, 515)


def _few_bits(member):
    use_tiles(8192)
    arena = member.arena()
    wanted = [("sum", torch.bfloat16), ("avg", torch.float32), ("max", torch.float16)]
    found = [
        mistake(member, arena, seed, name, op, dtype, (77,), special=True)
        for seed, (name, (op, dtype)) in enumerate(itertools.product(TRITON, wanted))
    ]
    assert not any(found), "\n".join(filter(None, found))


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_worlds_of_other_sizes_have_the_bits_of_the_reference(on_ranks, world_size):
    on_ranks(world_size, _few_bits)


def _odd_sizes(member):
    arena = member.arena(staging_bytes=4 << 20)
    shapes = [(shape, torch.float16) for shape in SIZES]
    shapes += [((65536 + 1,), torch.float16), ((65536 + 1,), torch.float32), ((), torch.float32)]
    found = [
        mistake(member, arena, seed, name, "sum", dtype, shape)
        for seed, (name, (shape, dtype)) in enumerate(itertools.product(TRITON, shapes))
    ]
    assert not any(found), "\n".join(filter(None, found))


def test_odd_and_empty_and_0d_sizes(on_ranks):
    on_ranks(3, _odd_sizes)


def _in_place(member):
    use_tiles(8192)
    arena = member.arena()
    cases = itertools.product(TRITON, [(5,), (1003,)], [torch.float32, torch.bfloat16])
    found = [
        mistake(member, arena, seed, name, "avg", dtype, shape, in_place=True)
        for seed, (name, shape, dtype) in enumerate(cases)
    ]
    assert not any(found), "\n".join(filter(None, found))


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_output_may_be_the_input(on_ranks, world_size):
    on_ranks(world_size, _in_place)


def bytes_written_past(member, names):
    """Where an algorithm wrote around the memory it was given; numel and place are odd."""
    arena = member.arena()
    found = []
    for name, numel, dtype in itertools.product(names, [1, 77, 1001], [torch.float32, torch.float16]):
        guarded = torch.full((numel + 202,), 77, dtype=dtype)
        out = guarded[101 : 101 + numel]
        reduce_by(name, torch.full((numel,), member.rank + 1.0, dtype=dtype), arena, "sum", out)
        if not (guarded[:101].eq(77).all() and guarded[101 + numel :].eq(77).all()):
            found.append(f"{name} {numel} {dtype}: guard band written")
        if not out.eq(sum(range(1, member.world_size + 1))).all():
            found.append(f"{name} {numel} {dtype}: {out}")
    return found


def _guard(member):
    use_tiles(8192)
    assert bytes_written_past(member, TRITON) == []


def test_nothing_is_written_around_the_output(on_ranks):
    on_ranks(3, _guard)


def _poisoned(member):
    use_tiles(8192)
    arena = member.arena(staging_bytes=128 * 1024)
    found = []
    for seed, (name, byte) in enumerate(itertools.product(TRITON, [0xFF, 0x5A])):
        poison(member, arena, str(seed), byte)
        found.append(mistake(member, arena, seed, name, "max", torch.float32, (333,)))
    assert not any(found), "\n".join(filter(None, found))


def test_leftovers_in_the_staging_do_not_reach_a_result(on_ranks):
    on_ranks(3, _poisoned)


def _larger_than_the_staging(member, names):
    use_tiles(8192)
    arena = member.arena(staging_bytes=64 * 1024)
    layout, found = arena.staging.layout, []
    for seed, (name, dtype) in enumerate(itertools.product(names, [torch.float32, torch.float16])):
        step = capacity(name, layout) // 128 * 128 // dtype.itemsize
        cases = ((False, (2 * step + 5,)), (True, (3, step)), (False, (step + 1,)))
        # Shorter elements in one case only: pieces are cut by their bytes.
        for in_place, shape in cases if dtype is torch.float32 else cases[:1]:
            found.append(mistake(member, arena, seed, name, "sum", dtype, shape, in_place=in_place))
    assert not any(found), "\n".join(filter(None, found))


def test_messages_larger_than_the_staging(on_ranks):
    on_ranks(3, _larger_than_the_staging, TRITON)


def _again_and_again(member):
    use_tiles(8192)
    arena = member.arena()
    found = [
        mistake(member, arena, seed, name, "sum", torch.float32, (500,))
        for name in TRITON
        for seed in range(20)
    ]
    assert not any(found), "\n".join(filter(None, found))


def test_the_same_call_twenty_times_with_changing_data(on_ranks):
    on_ranks(2, _again_and_again)


def delay_at_random(seed, monkeypatch, kernels=all_reduce):
    """Make this rank late now and then: before it publishes, from the host and from a module's kernels."""
    sleepy = random.Random(seed)

    def late(function):
        def run(*args, **kwargs):
            if sleepy.random() < 0.4:
                time.sleep(sleepy.random() * 0.01)
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(Channel, "begin", late(Channel.begin))
    monkeypatch.setattr(Channel, "publish", late(Channel.publish))
    monkeypatch.setattr(kernels, "publish", late(kernels.publish))
    monkeypatch.setattr(kernels, "finish_call", late(kernels.finish_call))


def _mixed(member, names, num_calls):
    use_tiles(512)
    with pytest.MonkeyPatch.context() as monkeypatch:
        arena = member.arena(staging_bytes=128 * 1024)
        delay_at_random(member.rank, monkeypatch)
        same = random.Random(7)
        found = []
        for seed in range(num_calls):
            name = same.choice(names)
            op, dtype = same.choice(supported(name))
            numel = same.choice([0, 1, 7, 300, 900])
            in_place = same.random() < 0.5
            found.append(mistake(member, arena, seed, name, op, dtype, (numel,), in_place=in_place))
    assert not any(found), "\n".join(filter(None, found))


@pytest.mark.parametrize("world_size", [2, 3])
def test_shapes_dtypes_and_algorithms_alternate_with_random_delays(on_ranks, world_size):
    on_ranks(world_size, _mixed, TRITON, 20)


def _ranks_are_late_in_turn(member):
    use_tiles(8192)
    arena, found = member.arena(), []
    for name, seed in itertools.product(TRITON, range(6)):
        if seed % member.world_size == member.rank:
            time.sleep(0.03)
        found.append(mistake(member, arena, seed, name, "sum", torch.float32, (64,)))
    assert not any(found), "\n".join(filter(None, found))


def test_whoever_comes_last_the_result_is_the_same(on_ranks):
    on_ranks(3, _ranks_are_late_in_turn)


BAD = [
    (torch.zeros(3), "mean", None, ConfigError, "op 'mean' is not among sum, avg, max, min"),
    (
        torch.zeros(3, dtype=torch.int32),
        "avg",
        None,
        ConfigError,
        "the average of torch.int32 is not a torch.int32; use sum, or a floating-point tensor",
    ),
    (torch.zeros(3, dtype=torch.uint8), "sum", None, ConfigError, "no kernel reduces torch.uint8"),
    (
        torch.zeros(3),
        "sum",
        torch.zeros(4),
        ConfigError,
        "out is torch.float32 [4], x is torch.float32 [3]; they must be alike",
    ),
    (
        torch.zeros(3),
        "sum",
        torch.zeros(3, dtype=torch.float16),
        ConfigError,
        "out is torch.float16 [3], x is torch.float32 [3]; they must be alike",
    ),
    (
        torch.zeros(2, 3).t(),
        "sum",
        None,
        ConfigError,
        "a kernel needs contiguous x and out; call .contiguous() first",
    ),
]


def _refuses_and_goes_on(member):
    use_tiles(8192)
    arena = member.arena()
    if member.rank == 0:
        for launcher, (x, op, out, kind, message) in itertools.product(LAUNCHERS.values(), BAD):
            with pytest.raises(kind) as caught:
                launcher(x, arena, op, out=out)
            assert str(caught.value) == message
        with pytest.raises(CapabilityError) as caught:
            LAUNCHERS["one_shot_ll"](torch.zeros(3, dtype=torch.float64), arena)
        assert str(caught.value) == "a lane carries 32 bits; torch.float64 has 64"
    found = [mistake(member, arena, 5, name) for name in TRITON]
    assert not any(found), "\n".join(filter(None, found))


def test_a_bad_argument_on_one_rank_sends_nothing(on_ranks):
    on_ranks(2, _refuses_and_goes_on)


def _without_staging(member):
    arena = open_arena("bare", member.exchange("bare"), "/dev/shm", 1, 20.0)
    for launcher in LAUNCHERS.values():
        with pytest.raises(CapabilityError) as caught:
            launcher(torch.zeros(3), arena)
        assert str(caught.value) == "the group has no staging memory yet; call prepare() first"
    arena.close("done")


def test_an_arena_without_staging_is_refused(on_ranks):
    on_ranks(1, _without_staging)
