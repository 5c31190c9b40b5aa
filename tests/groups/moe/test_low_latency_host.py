import pytest
import torch

from tcomm.errors import CommError
from tcomm.groups.moe.low_latency_host import quantise_for
from tcomm.memory.moe_slots import RowFormat
from tests.groups.moe.low_latency_cases import Case, make, mistakes_of, tokens_of


def _on_the_host(member):
    exchange = make(member)
    found = mistakes_of(exchange, Case(1, 3, fp8=("use_fp8",), hook=True))
    found += mistakes_of(exchange, Case(2, 8, "holes", zero_copy=True))
    # Somebody who publishes without saying how many there are.
    engine, case = exchange._engine, Case(3, 2)
    if member.rank == 1:
        words = engine._words
        engine._words = lambda rank, epoch: words(rank, epoch).clone() if rank == 0 else words(rank, epoch)
    x, topk_idx, _ = tokens_of(case, exchange.layout, member.rank)
    if member.rank == 0:
        with pytest.raises(CommError, match="#5 of group 'll': a peer published without its numbers"):
            exchange.dispatch(x, topk_idx)
    else:
        exchange.dispatch(x, topk_idx)
    member.meet("done")
    return found, exchange.workspace.traffic.num_phases


def test_the_host_moves_and_sums_rows_and_takes_no_stale_numbers(on_ranks):
    assert on_ranks(2, _on_the_host) == [([], 5)] * 2


def test_rows_as_they_travel():
    x = torch.randn(2, 256).bfloat16()
    plain, none = quantise_for(RowFormat(256, torch.bfloat16), x)
    assert (plain is x, none) == (True, None)
    rows, words = quantise_for(RowFormat(256, torch.bfloat16, True, True, True), x)
    assert (rows.dtype, words.dtype, words.shape) == (torch.float8_e4m3fn, torch.int32, (2, 1))
