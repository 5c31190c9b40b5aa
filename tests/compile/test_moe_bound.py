"""Compiled launches of exchanges of tokens, as tests on a GPU make them: to a driver that runs nothing."""

import types

import pytest
import torch

from tcomm.groups.moe.routes import as_word_rows, make_routes
from tcomm.kernels import moe_high_throughput, moe_low_latency, moe_one_sided, moe_two_sided
from tcomm.kernels.moe_layout import FoundLayout
from tcomm.memory.base import LaunchPart
from tcomm.memory.rings import RingLayout
from tcomm.signature import CallDescription
from tests.compile.test_bound import FakeLauncher, driver  # noqa: F401 - a fixture
from tests.kernels import low_latency_ranks, virtual_tokens
from tests.kernels.virtual_arenas import arena_of_half
from tests.virtual_worlds import MODES

WORLD, TOKENS, TOPK, EXPERTS, HIDDEN = 4, 64, 8, 64, 7168
CALL = CallDescription("turn", "rows")


@pytest.fixture
def launched(driver, monkeypatch):  # noqa: F811
    """What was launched, where torch and the host's way to look at a GPU know of none."""
    on_host = types.SimpleNamespace(empty=_empty_on_host, int64=torch.int64)
    monkeypatch.setattr(moe_high_throughput, "torch", on_host)
    monkeypatch.setattr(moe_low_latency, "has_e4m3", lambda device: True)
    monkeypatch.setattr(virtual_tokens, "find_layout", _no_layout)
    return FakeLauncher.launched


def _empty_on_host(*shape, device, **kwargs):
    del device
    return torch.zeros(*shape, **kwargs)  # counts, which nobody writes here


def _no_layout(idx, num_experts, world):
    slots = torch.zeros(len(idx), world, dtype=torch.int32)
    return FoundLayout(slots, slots.new_zeros(len(idx) + 1, world), slots.new_zeros(num_experts))


def _take_for_gpu(arena, mode):
    arena.device = torch.device("cuda", 0)
    if mode == "streams":
        streams = [types.SimpleNamespace(cuda_stream=100 + rank) for rank in range(WORLD)]
        arena.launch_parts = tuple(LaunchPart(rank, 1, stream) for rank, stream in enumerate(streams))


def _check_launches(launched, loaded, names, mode, run):
    """Check two calls, of which the second compiles nothing."""
    run()
    known = len(loaded)
    run()
    assert len(loaded) == known
    ranks = 1 if mode == "grid" else WORLD
    parts = launched[::ranks]
    assert [found.name for found in parts] == [f"_{name}_kernel" for name in names] * 2
    for found in launched:
        blocks, width, one = found.grid
        assert 1 <= blocks <= 32
        assert (width, one) == (WORLD // ranks, 1)
        assert (found.metadata.num_warps, found.metadata.maxnreg) == (8, 128)
        assert found.metadata.launch_cooperative_grid is (mode == "grid")
        assert (found.args["WORLD"], found.args["VIRTUAL"]) == (WORLD, True)
    if mode == "streams":
        told = [(found.args["rank"], found.stream) for found in launched]
        assert told == [(rank, 100 + rank) for rank in range(WORLD)] * len(parts)


every_mode = pytest.mark.parametrize("mode", MODES)
every_scaling = pytest.mark.parametrize("scaling", low_latency_ranks.SCALINGS)


@every_mode
@every_scaling
def test_low_latency(launched, driver, mode, scaling):  # noqa: F811
    ranks = low_latency_ranks.VirtualExchange(
        WORLD, EXPERTS // WORLD, TOKENS, TOPK, 1024, scaling=scaling, mode=mode
    )
    _take_for_gpu(ranks.arena, mode)
    names = ("plan", "send_copies", "receive_copies", "send_rows", "sum_rows")
    _check_launches(launched, driver.loaded, names, mode, ranks.run)
    first, send, receive, back, last = (found.args for found in launched[:: len(launched) // 10][:5])
    assert first["idx_ptr"] == send["idx_ptr"] == last["idx_ptr"] == ranks.idx.data_ptr()
    assert (send["rows_ptr"], receive["rows_ptr"]) == (ranks.x.data_ptr(), ranks.rows.data_ptr())
    assert (receive["ranges_ptr"], back["ranges_ptr"]) == (ranks.ranges.data_ptr(),) * 2
    assert (last["out_ptr"], last["weights_ptr"]) == (ranks.out.data_ptr(), ranks.weights.data_ptr())
    assert send["BY_INSTRUCTION"] is True


@every_mode
def test_exact_sizes(launched, driver, mode):  # noqa: F811
    rounds = virtual_tokens.Rounds(
        "cpu", WORLD, mode, TOKENS, HIDDEN, torch.bfloat16, TOPK, EXPERTS // WORLD, 32 << 20, seeds=1
    )
    _take_for_gpu(rounds.arena, mode)
    names = ("stage_tokens", "fetch_heads", "gather_rows", "return_rows", "sum_places")
    _check_launches(launched, driver.loaded, names, mode, rounds.run)


@every_mode
def test_one_sided(launched, driver, mode):  # noqa: F811
    arena = arena_of_half(WORLD, "cpu", 2 << 20, mode)
    _take_for_gpu(arena, mode)
    routes = [make_routes(torch.randint(0, EXPERTS, (TOKENS, TOPK)), EXPERTS, WORLD) for _ in range(WORLD)]
    tables = tuple(map(torch.stack, zip(*(one.tables for one in routes), strict=True)))
    x = torch.zeros(WORLD, TOKENS, HIDDEN, dtype=torch.bfloat16)
    words = torch.stack([as_word_rows(one) for one in x])
    made = torch.zeros(WORLD, WORLD, TOKENS, HIDDEN, dtype=torch.bfloat16)

    def run():
        received = moe_one_sided.dispatch([words], [1024], tables, TOKENS, arena, CALL, 20.0)
        moe_one_sided.combine(made, torch.empty_like(x), 1 << 20, tables, received, TOKENS, arena, CALL, 20.0)

    names = ("push_payload", "open_call", "take_counts", "stage_results", "open_call", "pull_sums")
    _check_launches(launched, driver.loaded, names, mode, run)


@every_mode
def test_two_sided(launched, driver, mode):  # noqa: F811
    layout = RingLayout(WORLD, 2, 64 << 10)
    arena = arena_of_half(WORLD, "cpu", layout.nbytes, mode)
    _take_for_gpu(arena, mode)
    x, sent = torch.zeros(WORLD, 8, 1792, dtype=torch.int64), torch.ones(WORLD, WORLD, dtype=torch.int64)
    table = torch.zeros(WORLD, WORLD, 2, dtype=torch.int64), sent

    def run():
        moe_two_sided.announce(sent, arena, CALL, 20.0)
        moe_two_sided.exchange_rows(x, torch.empty_like(x), table, table, layout, arena, CALL, 20.0)

    names = ("open_call", "take_counts", "open_call", "stream_rows")
    _check_launches(launched, driver.loaded, names, mode, run)
