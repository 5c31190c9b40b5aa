"""Ranks that are masked by hand while they wait, and results that lack their rows."""

import time

import pytest
import torch

from tcomm.errors import ConfigError, PeerTimeoutError, UsageError
from tests.groups.moe.low_latency_cases import make, tokens_of
from tests.groups.moe.test_low_latency_masks import CASES, sum_of, wanted
from tests.memory.fake_symm_mem import give_workspaces_device_memory

OUT, SECONDS = 2, 1.0


def _waits_in_vain(member, engine, on_device):
    """Rank 2 waits in a dispatch when the others mask it: it raises, and they go on, and then all do."""
    if on_device:
        give_workspaces_device_memory(member)
    exchange = make(member, engine=engine, num_experts=6)
    layout, masks, told = exchange.layout, exchange.masks, [sum_of(exchange, CASES[0])]
    exchange._lending_space()
    if member.rank == OUT:
        member.meet("rank 2 is in its call soon")
        began = time.monotonic()
        with pytest.raises(PeerTimeoutError, match="have gone on without this rank, 2, since call #3") as one:
            exchange.dispatch(*tokens_of(CASES[1], layout, OUT)[:2], use_fp8=False, timeout=SECONDS)
        told += [one.value.peers, SECONDS <= time.monotonic() - began < 5]
        with pytest.raises(PeerTimeoutError, match="since call #3"):
            exchange.dispatch(*tokens_of(CASES[1], layout, OUT)[:2])
    else:
        member.meet("rank 2 is in its call soon")
        time.sleep(SECONDS / 2)
        masks.update(OUT, True)
        told.append(sum_of(exchange, CASES[1]))
    member.meet("rank 2 has raised")
    if member.rank != OUT:
        told.append(sum_of(exchange, CASES[2]))
        with pytest.raises(ConfigError, match="and raised in the next: it cannot just go on; call clean"):
            masks.update(OUT, False)
    masks.clean()
    told.append(sum_of(exchange, CASES[3]))
    exchange.close()
    return layout, told


@pytest.mark.parametrize(("engine", "on_device"), [("cpu", False), ("triton", True)])
def test_who_is_masked_while_it_waits_raises_alone(on_ranks, engine, on_device):
    for rank, (layout, told) in enumerate(on_ranks(3, _waits_in_vain, engine, on_device)):
        assert told[0] == wanted(CASES[0], layout, rank)
        if rank == OUT:
            assert told[1:3] == [(OUT,), True]
        else:
            assert told[1:3] == [wanted(CASES[n], layout, rank, {OUT}) for n in (1, 2)]
        assert told[-1] == wanted(CASES[3], layout, rank)


def _half_a_part(member):
    """Rank 2 is masked in an open dispatch, has completed it itself, and shall have a part in the combine."""
    exchange = make(member, num_experts=6)
    layout, masks, rank = exchange.layout, exchange.masks, member.rank
    x, topk_idx, weights = tokens_of(CASES[0], layout, rank)
    rows, _, handle, hook = exchange.dispatch(x, topk_idx, use_fp8=False, return_recv_hook=True)
    y = torch.zeros_like(rows)
    if rank != OUT:
        masks.update(OUT, True)
    hook()
    member.meet("all have received")
    if rank != OUT:
        with pytest.raises(UsageError, match="result of dispatch #1 is alive that has no rows of rank 2"):
            masks.update(OUT, False)
        assert masks.query().tolist() == [0, 0, 1]
        with pytest.raises(UsageError, match=r"ranks \[2\] are masked; call it once before, or"):
            exchange.next_combine_buffer(handle)
        exchange.combine(y, topk_idx, weights, handle)
    member.meet("rank 2 is not waited for")
    masks.clean()
    with pytest.raises(UsageError, match="the handle has no result here"):
        exchange.combine(y, topk_idx, weights, handle)
    told = [sum_of(exchange, CASES[1])]
    member.meet("all have completed it")
    if rank != OUT:
        # It called nothing meanwhile.
        masks.update(OUT, True)
        masks.update(OUT, False)
    member.meet("unmasked")
    told.append(sum_of(exchange, CASES[2]))
    exchange.close()
    return layout, told


def test_no_rank_takes_part_in_half_of_an_exchange(on_ranks):
    for rank, (layout, told) in enumerate(on_ranks(3, _half_a_part)):
        assert told == [wanted(CASES[n], layout, rank) for n in (1, 2)]


def _left_open(member):
    """Rank 2 has calls open that nobody completes: one raises, and one must not keep all from coming back."""
    exchange = make(member, num_experts=6)
    masks, is_out = exchange.masks, member.rank == OUT
    x, topk_idx, weights = tokens_of(CASES[0], exchange.layout, member.rank)
    for number in range(2):
        if not is_out:
            masks.update(OUT, True)
        member.meet("masked")
        if is_out:
            rows, _, handle, hook = exchange.dispatch(
                x, topk_idx, use_fp8=False, return_recv_hook=True, timeout=0.1
            )
        if is_out and number == 0:
            with pytest.raises(PeerTimeoutError, match="have gone on without this rank, 2"):
                hook()
            with pytest.raises(UsageError, match="was not received: its dispatch raised; dispatch again"):
                exchange.combine(torch.zeros_like(rows), topk_idx, weights, handle)
        masks.clean()
    assert not is_out or hook.is_done
    return exchange.layout, sum_of(exchange, CASES[4])


def test_calls_that_nobody_completes_keep_nobody_from_coming_back(on_ranks):
    for rank, (layout, total) in enumerate(on_ranks(3, _left_open)):
        assert total == wanted(CASES[4], layout, rank)


def _reads_too_late(member):
    """Rank 2 stops when it may read what owners lend, and the others mask it and write there."""
    exchange = make(member, num_experts=6)
    exchange.masks.on_timeout = "mask"
    exchange._lending_space()
    sum_of(exchange, CASES[1])
    if member.rank == OUT:
        engine, told = exchange._engine, []
        lent = engine._lent

        def stopped(*args):
            if not told:
                told.append(time.sleep(1.2))
            return lent(*args)

        engine._lent = stopped
        with pytest.raises(PeerTimeoutError, match="have gone on without this rank, 2"):
            sum_of(exchange, CASES[3])
        return True
    sum_of(exchange, CASES[3])
    exchange.workspace.timeout = 0.4
    for case in CASES[:2]:
        sum_of(exchange, case)
    return exchange.masks.query().tolist() == [0, 0, 1]


def test_who_reads_what_is_no_longer_lent_to_it_says_so(on_ranks):
    assert on_ranks(3, _reads_too_late) == [True] * 3
