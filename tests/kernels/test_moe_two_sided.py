"""The kernels do what the CPU twins do, bit by bit: the bodies are those of the tests of the exchange."""

import pytest
import torch

from tcomm.errors import CapabilityError
from tcomm.kernels import moe_two_sided
from tcomm.kernels.launch import launches
from tcomm.memory.rings import RingLayout
from tcomm.memory.virtual import VirtualArena
from tcomm.signature import CallDescription
from tests.cpu import test_moe_two_sided as cpu
from tests.groups.moe import test_two_sided as exchange
from tests.kernels.virtual_rows import check_two_sided

CALL = CallDescription("turn", "rows")
KERNELS = {"_open_call_kernel", "_take_counts_kernel", "_stream_rows_kernel"}


def _rounds(member, engine, kinds):
    exchange.PAYLOADS = exchange.PAYLOADS[1:3]
    agreed = exchange.rounds(member, engine, member.world_size == 3, kinds, (3,))
    return agreed and launches.keys() >= KERNELS


@pytest.mark.parametrize(("world", "kinds"), [(2, ("random", "some_ranks_empty")), (3, ("random",))])
def test_the_exchange_by_kernels(on_ranks, world, kinds):
    assert on_ranks(world, _rounds, "triton", kinds, timeout=100.0) == [True] * world


def test_any_amount_goes_through_rings_that_stay_small(on_ranks):
    assert max(on_ranks(2, exchange.streams, "triton", 24)) <= 384


def test_a_dead_peer_and_a_silent_one_are_named_by_kernels(on_ranks):
    outcomes = on_ranks(2, exchange.dies, "triton", check=False)
    assert outcomes[0].value == (1,), outcomes[0].error
    assert on_ranks(2, exchange.silent, "triton") == [(1,)] * 2


def test_what_does_not_fit_is_told_with_kernels_too(on_ranks):
    first, second = on_ranks(2, exchange._misuse, "triton")
    assert first == second
    assert first[1]


def test_rows_go_where_the_tables_say(on_ranks):
    cpu.check_all(on_ranks(2, cpu.all_streams, "triton", 0.05))


def test_a_peer_that_takes_nothing_is_named_and_one_that_is_done_may_leave(on_ranks):
    assert on_ranks(2, cpu.stuck, "triton")[0] == 0
    assert on_ranks(2, cpu.left, "triton") == [0, 12 * 5 * 7]


def test_tables_that_do_not_fit_end(on_ranks):
    first, second = on_ranks(2, cpu.unfit, "triton")
    assert not first
    assert "turn #1 of group 'arena' timed out after 20 s on rank 1: rank 0" in second


@pytest.mark.parametrize(("mode", "lanes"), [("grid", 1), ("streams", 2)])
def test_virtual_ranks_and_several_lanes(mode, lanes):
    """The example of the docstring, on three ranks, by lanes that work side by side."""
    check_two_sided("cpu", [[1, 9, 0], [2, 0, 3], [4, 5, 1]], mode, lanes)


def test_more_programs_than_the_device_holds_are_refused():
    arena = VirtualArena(3, torch.device("cpu"), 256 << 10)
    arena.max_blocks = 5
    none = torch.zeros(3, 3, 1, dtype=torch.int64), torch.zeros(3, 3, dtype=torch.int64)
    x = torch.zeros(3, 1, 2, dtype=torch.int64)
    with pytest.raises(
        CapabilityError, match=r"rings of 2 lanes takes 6 programs at once, and .* room for 5"
    ):
        moe_two_sided.exchange_rows(x, x, none, none, RingLayout(3, 2, 128), arena, CALL, 20.0)


def test_constants_cut_rows_for_slots():
    constants = moe_two_sided.ring_constants(RingLayout(2, 2, 256), 40, 8, 100)
    told = {name: constants[name] for name in ("WIDTH", "PIECE_ROWS", "NUM_LANES", "SLOT_BYTES", "UNIT")}
    assert told == {"WIDTH": 32, "PIECE_ROWS": 1, "NUM_LANES": 2, "SLOT_BYTES": 256, "UNIT": 16}
