"""Exchanges of tokens of virtual ranks, compiled: the bodies of `tests/kernels/test_moe_*.py`, and graphs."""

import pytest
import torch

from tests.kernels import fp8_rows, low_latency_ranks, virtual_rows, virtual_tokens
from tests.kernels.low_latency_ranks import SCALINGS
from tests.kernels.virtual_arenas import check_rounds, settle
from tests.virtual_worlds import MODES

pytestmark = [pytest.mark.gpu(1), pytest.mark.timeout(240)]

every_mode = pytest.mark.parametrize("mode", MODES)
every_world = pytest.mark.parametrize("world", [2, 4, 8], ids="{}ranks".format)
every_scaling = pytest.mark.parametrize("scaling", SCALINGS, ids=("plain", "fp8", "rounded", "ue8m0"))
STAGING = 40 << 20
"""Bytes a rank, of the exchange with exact sizes: room for 128 tokens of 8 places."""


@every_mode
@every_world
def test_exact_dispatch(world, mode):
    virtual_tokens.check_dispatch("cuda", world, mode, 0, 8, STAGING)
    virtual_tokens.check_dispatch("cuda", world, mode, 7, 4096, 256 << 10)  # in pieces
    for dtype, hidden in ((torch.bfloat16, 7168), (torch.float32, 2048)):
        virtual_tokens.check_dispatch("cuda", world, mode, 128, hidden, STAGING, dtype, 8, 64 // world)


@every_mode
@every_world
def test_exact_combine(world, mode):
    """Twice, with the same bits."""
    virtual_tokens.check_combine("cuda", world, mode, 7, 4096, torch.bfloat16, 256 << 10, 1)
    for dtype, hidden, num_terms in ((torch.bfloat16, 7168, 0), (torch.float32, 2048, 2)):
        virtual_tokens.check_combine(
            "cuda", world, mode, 128, hidden, dtype, STAGING, num_terms, 8, 256 // world, times=2
        )


@every_mode
def test_rows_beyond_the_room_are_left_out_2ranks(mode):
    virtual_tokens.check_room("cuda", mode)


def test_where_tokens_go():
    virtual_tokens.check_places("cuda")
    virtual_tokens.check_places("cuda", (2, 8), 300)
    virtual_tokens.check_out_of_range("cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("round_scale", [False, True])
def test_quantised_rows_have_the_bits_of_the_host(dtype, round_scale):
    for by_instruction in fp8_rows.ways_of("cuda"):
        fp8_rows.check_quantise("cuda", dtype, round_scale, by_instruction)


def test_every_upper_half_of_a_number_is_rounded_as_by_torch_on_the_host():
    for by_instruction in fp8_rows.ways_of("cuda"):
        fp8_rows.check_encode("cuda", by_instruction)


@every_scaling
@every_mode
@every_world
def test_low_latency_dispatch(world, mode, scaling):
    options = {"device": "cuda", "mode": mode, "scaling": scaling}
    low_latency_ranks.check_dispatch(world, hidden=640, **options)
    low_latency_ranks.check_dispatch(world, 256 // world, 64, 8, 7168, **options)
    low_latency_ranks.check_dispatch(world, 64 // world, 128, 8, 2048, dtype=torch.float32, **options)


@pytest.mark.parametrize("lends", [False, True], ids=["sends", "lends"])
@every_mode
@every_world
def test_low_latency_combine(world, mode, lends):
    """Twice, with the same bits."""
    options = {"device": "cuda", "mode": mode, "lends": lends, "times": 2}
    low_latency_ranks.check_combine(world, **options)
    low_latency_ranks.check_combine(world, 128 // world, 64, 8, 7168, **options)
    low_latency_ranks.check_combine(world, 64 // world, 128, 8, 2048, dtype=torch.float32, **options)
    low_latency_ranks.check_combine(world, 64 // world, 64, 8, 2048, scaling=SCALINGS[3], **options)


@every_world
def test_weights_of_any_number_of_bits(world):
    low_latency_ranks.check_any_weights(world, 64 // world, 64, 8, 2048, device="cuda")


@pytest.mark.parametrize("lends", [False, True], ids=["sends", "lends"])
def test_low_latency_without_some_ranks(lends):
    low_latency_ranks.check_masked(4, (1,), 32, 64, 8, 2048, lends=lends, device="cuda")
    low_latency_ranks.check_masked(8, (0, 5), 8, 64, 8, 7168, lends=lends, scaling=SCALINGS[1], device="cuda")


@every_mode
@every_world
def test_one_sided(world, mode):
    virtual_rows.check_one_sided("cuda", world, mode)
    for dtype, hidden in ((torch.bfloat16, 7168), (torch.float32, 2048)):
        virtual_rows.check_one_sided("cuda", world, mode, 96, hidden, dtype, 8, 64 // world)


@every_mode
@every_world
def test_two_sided(world, mode):
    """Rows in pieces of several, of one, and of a part of one."""
    sent = [[(5 * rank + 3 * peer) % 11 for peer in range(world)] for rank in range(world)]
    virtual_rows.check_two_sided("cuda", sent, mode, 1)
    virtual_rows.check_two_sided("cuda", sent, mode, 2, 16 << 10, 256)
    sent = [[16 * (rank + peer) % 96 for peer in range(world)] for rank in range(world)]
    virtual_rows.check_two_sided("cuda", sent, mode, 2, 8 << 10, 1792, turns=3)


def test_a_rank_that_never_comes_is_named():
    low_latency_ranks.check_missing_rank(4, 2, "cuda", 0.5)
    virtual_tokens.check_missing_rank("cuda", 4, 2, 0.5)


def _capture(rounds):
    """A graph of a dispatch, what experts make of it, and a combine."""
    # Once before: nothing is compiled, loaded or made during a capture.
    rounds.put(0)
    rounds.run()
    settle(rounds.arena)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rounds.run()
    return graph


@every_scaling
@every_mode
@every_world
def test_low_latency_in_a_graph_with_new_tokens(world, mode, scaling):
    rounds = low_latency_ranks.Rounds(
        world, 64 // world, 64, 8, 2048, scaling=scaling, device="cuda", mode=mode
    )
    check_rounds(rounds, _capture(rounds).replay, 100)


@every_mode
@every_world
def test_exact_sizes_in_a_graph_with_new_tokens_and_room_for_all(world, mode):
    rounds = virtual_tokens.Rounds("cuda", world, mode, 64, 2048, torch.bfloat16, 8, 64 // world, STAGING)
    check_rounds(rounds, _capture(rounds).replay, 100)


@every_mode
def test_replays_and_eager_calls_of_both_kinds_mix_4ranks(mode):
    """Each exchange has memory of its own, and its own order of calls."""
    many = [
        low_latency_ranks.Rounds(4, 16, 32, 4, 1024, device="cuda", mode=mode),
        virtual_tokens.Rounds("cuda", 4, mode, 32, 1024, torch.float32, 4, 16, STAGING),
    ]
    graphs = [_capture(rounds) for rounds in many]
    for _ in range(10):
        for rounds, graph in zip(many, graphs, strict=True):
            check_rounds(rounds, graph.replay, 3)
            check_rounds(rounds, times=3)
