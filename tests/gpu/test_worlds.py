"""The bodies of `tests/groups/test_virtual.py`, compiled: the same bits as the reference on a CPU."""

import pytest
import torch

from tests import virtual_worlds as worlds
from tests.virtual_worlds import MODES

pytestmark = [pytest.mark.gpu(1), pytest.mark.timeout(240)]

every_mode = pytest.mark.parametrize("mode", MODES)
every_world = pytest.mark.parametrize("world", [2, 4, 8], ids="{}ranks".format)
TILE = 16 * 256
"""Bytes that a program handles at a time."""
NUMELS = (0, 1, 13, TILE // 2, 16 * TILE // 2 + 24, 3 * 16 * TILE // 2 + 1001)
"""Of bfloat16: none, tails, one tile, one of each program and a tail, several of each."""


@every_world
def test_meaning(world):
    worlds.check_meaning("cuda", world, "grid", NUMELS)


@every_world
def test_launches_of_their_own_mean_the_same(world):
    worlds.check_meaning("cuda", world, "streams", (13, 3 * 16 * TILE // 2 + 1001))


def test_one_rank_alone():
    worlds.check_meaning(
        "cuda", 1, "grid", (0, 1001), cases=[("all_reduce", "two_shot"), ("broadcast", "push")]
    )


@pytest.mark.parametrize(
    ("op", "dtypes"),
    [
        ("sum", (torch.float32, torch.float16, torch.float64, torch.int32, torch.int64)),
        ("avg", (torch.bfloat16, torch.float32)),
        ("max", (torch.bfloat16, torch.float16)),
        ("min", (torch.float32, torch.int64)),
    ],
)
def test_operations_and_dtypes_2ranks(op, dtypes):
    worlds.check_reductions("cuda", 2, "grid", 5001, wanted=[(op, dtype) for dtype in dtypes])


def test_eight_ranks_round_once_8ranks():
    worlds.check_reductions("cuda", 8, "grid", 5001, wanted=[("avg", torch.bfloat16), ("sum", torch.float16)])


def test_every_dtype_moves_4ranks():
    worlds.check_moves("cuda", 4, "grid", 1037)


@every_world
def test_long_messages_go_in_pieces(world):
    worlds.check_pieces("cuda", world, "grid")


def test_the_output_may_be_the_input_4ranks():
    worlds.check_in_place("cuda", 4, "grid")


@every_world
def test_nothing_around_a_tensor_is_touched(world):
    worlds.check_guard_bands("cuda", world, "grid", (1, 13, 1001, 16 * TILE // 2 + 3))


@every_mode
@every_world
def test_memory_is_reused_by_a_thousand_calls_back_to_back(world, mode):
    worlds.check_reuse("cuda", world, mode, 1000, (1, 1001, 40_000))


@every_mode
@pytest.mark.parametrize("start", [2**32 - 4, 2**31 - 4, 2**30 - 4, 3 * 2**30 - 4])
def test_epochs_go_on_across_a_wrap_and_a_renewal_4ranks(mode, start):
    worlds.check_epochs_near("cuda", 4, mode, start)


def test_calls_on_other_streams_are_one_order_4ranks():
    ranks = worlds.make("cuda", 4)
    jobs = worlds.make_jobs(ranks, (1001, 40_000), (torch.bfloat16,))
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    outs = []
    for index in range(300):
        verb, algorithm, x, want = jobs[index % len(jobs)]
        with torch.cuda.stream(streams[index % 3]):
            outs.append((worlds.call(ranks, verb, algorithm, x), want))
    ranks.check()
    assert sum(int(worlds.count_different(got, want)) for got, want in outs) == 0
