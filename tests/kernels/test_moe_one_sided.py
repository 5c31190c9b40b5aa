"""The kernels do what the CPU twins do, bit by bit: the bodies are those of the tests of the exchange."""

import pytest
import torch

from tcomm.cpu import moe_one_sided as twin
from tcomm.errors import PeerTimeoutError
from tcomm.groups.moe.routes import make_routes
from tcomm.kernels import moe_counts, moe_one_sided
from tcomm.kernels.launch import launches
from tcomm.signature import CallDescription
from tests.groups.moe import test_one_sided as exchange
from tests.kernels.virtual_rows import check_one_sided

CALL = CallDescription("turn", "rows")
KERNELS = {
    "_push_payload_kernel",
    "_open_call_kernel",
    "_take_counts_kernel",
    "_stage_results_kernel",
    "_pull_sums_kernel",
}


def _rounds(member, engine, kinds):
    moved = exchange.rounds(member, engine, member.world_size == 4, kinds)
    return moved, launches.keys() & KERNELS


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_exchange_by_kernels(on_ranks, world):
    kinds = exchange.KINDS[:3] if world == 2 else ("random",)
    told = on_ranks(world, _rounds, "triton", kinds)
    assert (sum(moved for moved, _ in told) > 0) == (world > 1)
    assert set().union(*(launched for _, launched in told)) == KERNELS


def test_a_dead_peer_and_a_silent_one_are_named_by_kernels(on_ranks):
    outcomes = on_ranks(2, exchange.dies, "triton", check=False)
    assert outcomes[0].value == (1,), outcomes[0].error
    assert on_ranks(2, exchange.silent, "triton") == [(1,)] * 2


def test_what_is_out_of_place_is_told_with_kernels_too(on_ranks):
    first, second = on_ranks(2, exchange._misuse, "triton")
    assert first == second
    assert first[1]


@pytest.mark.parametrize(("world", "mode"), [(8, "grid"), (3, "streams")])
def test_virtual_ranks(world, mode):
    check_one_sided("cpu", world, mode)


def _examples(member):
    """Of the docstrings."""
    arena = member.arena(64 << 10)
    rank = member.rank
    base = arena.staging.layout.half(0)
    x = torch.tensor([[7], [8]]) if rank else torch.empty(0, 1, dtype=torch.int64)
    ids = torch.tensor([[0, -1], [0, 1]]) if rank else torch.empty(0, 2, dtype=torch.int64)
    routes = make_routes(ids, 2, 2)
    received = moe_one_sided.dispatch([x], [128], routes.tables, 2, arena, CALL, 20.0)
    block = arena.staging.buffer.peer(rank, (2, 2), torch.int64, base + 128)[1, : int(received[1])]
    rows = torch.tensor([[[0.0], [0.0]], [[3.0], [4.0]]] if rank == 0 else [[[0.0], [0.0]], [[5.0], [0.0]]])
    sums = [torch.empty(len(ids), 1) for _ in range(2)]
    for engine, out in zip((moe_one_sided, twin), sums, strict=True):
        engine.combine(rows, out, 1024, routes.tables, received, 2, arena, CALL, 20.0)
    # A word of another call is an error, and no count.
    epoch = moe_counts.open_call(torch.tensor([1, 1]), arena, CALL, 20.0, counted=False)
    with pytest.raises(PeerTimeoutError) as caught:
        moe_counts.take_counts(torch.empty(2, dtype=torch.int64), arena, CALL, 20.0, epoch)
    stale = str(caught.value)
    return received.tolist(), block.tolist(), [one.flatten().tolist() for one in sums], stale


def test_the_examples_of_the_docstrings(on_ranks):
    first, second = on_ranks(2, _examples)
    assert first[:3] == ([0, 2], [7, 8], [[], []])
    assert second[:3] == ([0, 1], [8], [[3.0, 9.0]] * 2)
    assert "turn #4 of group 'arena' timed out" in first[3]
