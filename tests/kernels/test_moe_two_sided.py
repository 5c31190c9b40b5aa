"""The kernels do what the CPU twins do, bit by bit: the bodies are those of the tests of the exchange."""

import pytest
import torch

from tcomm.cpu import moe_two_sided as twin
from tcomm.kernels import moe_two_sided
from tcomm.kernels.launch import launches
from tcomm.memory.rings import HEAD, SENT, RingLayout
from tcomm.memory.virtual import VirtualArena
from tcomm.signature import CallDescription
from tests.groups.moe import test_two_sided as exchange
from tests.groups.moe.routings import same_bytes

CALL = CallDescription("turn", "rows")
KERNELS = {"_open_call_kernel", "_take_counts_kernel", "_exchange_rows_kernel"}


def _rounds(member, engine, kinds):
    agreed = exchange.rounds(member, engine, member.world_size == 4, kinds, (3,))
    return agreed and launches.keys() >= KERNELS


@pytest.mark.parametrize(("world", "kinds"), [(2, ("random", "some_ranks_empty")), (4, ("random",))])
def test_the_exchange_by_kernels(on_ranks, world, kinds):
    assert on_ranks(world, _rounds, "triton", kinds, timeout=100.0) == [True] * world


def test_any_amount_goes_through_rings_that_stay_small(on_ranks):
    assert max(on_ranks(2, exchange.streams, "triton", 40)) <= 384
    assert max(on_ranks(3, exchange.streams, "triton", 24)) <= 256


def test_a_dead_peer_and_a_silent_one_are_named_by_kernels(on_ranks):
    outcomes = on_ranks(2, exchange.dies, "triton", check=False)
    assert outcomes[0].value == (1,), outcomes[0].error
    assert on_ranks(2, exchange.silent, "triton") == [(1,)] * 2


def test_what_does_not_fit_is_told_with_kernels_too(on_ranks):
    first, second = on_ranks(2, exchange._misuse, "triton")
    assert first == second
    assert first[1]
