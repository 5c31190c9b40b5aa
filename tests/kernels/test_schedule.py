import random
import threading

import pytest
import torch
import triton
import triton.language as tl

from tcomm.errors import ConfigError, PeerTimeoutError
from tcomm.groups.virtual import VirtualRanks
from tcomm.kernels import schedule
from tcomm.kernels.bound import budget_of
from tcomm.kernels.device import axis_rank, launched_rank, pause
from tcomm.kernels.launch import rows_of
from tcomm.memory.base import LaunchPart
from tcomm.memory.control import HostWord


@triton.jit
def _hand_over_kernel(trace_ptr, rank, ROUNDS: tl.constexpr):
    rank = launched_rank(rank)
    for _ in tl.static_range(ROUNDS):
        turn = tl.load(trace_ptr)
        tl.store(trace_ptr + 1 + turn, rank * 10 + tl.program_id(0))
        tl.store(trace_ptr, turn + 1)
        zero = tl.full((), 0, tl.int64)
        pause(0, tl.program_id(0), zero, trace_ptr, zero, zero, zero, False)


def _trace(parts, num_blocks=1, rounds=2, order=None):
    ranks = sum(part.num_ranks for part in parts)
    trace = torch.zeros(1 + ranks * num_blocks * rounds, dtype=torch.int64)
    schedule.run_in_turns(
        parts, lambda rank: _hand_over_kernel[(num_blocks,)](trace, rank, ROUNDS=rounds), 5.0, order
    )
    assert trace[0] == len(trace) - 1
    return trace[1:].tolist()


@pytest.mark.parametrize("parts", [(LaunchPart(0, 3),), tuple(LaunchPart(r) for r in range(3))])
def test_ranks_take_turns_and_know_who_they_are(parts):
    assert _trace(parts) == [0, 10, 20] * 2


def test_a_program_that_gets_its_turn_back_is_the_same_program():
    # The block, which the interpreter keeps in one place for all, is the last digit.
    assert _trace((LaunchPart(0, 2),), num_blocks=2) == [0, 10, 0, 10, 1, 11, 1, 11]


def test_the_order_can_be_drawn():
    orders = {tuple(_trace((LaunchPart(0, 3),), rounds=4, order=random.Random(seed))) for seed in range(8)}
    assert len(orders) > 3


def test_a_rank_that_fails_ends_the_others_and_is_what_is_raised():
    def launch(rank):
        if rank == 1:
            raise ZeroDivisionError("of rank 1")
        _hand_over_kernel[(1,)](torch.zeros(100, dtype=torch.int64), rank, ROUNDS=3)

    threads = threading.active_count()
    with pytest.raises(Exception, match="of rank 1"):
        schedule.run_in_turns(tuple(LaunchPart(r) for r in range(3)), launch, 5.0)
    assert threading.active_count() == threads
    assert _trace((LaunchPart(0, 2),)) == [0, 10] * 2


def test_the_axis_is_zero_where_each_launch_is_one_rank():
    assert axis_rank() == 0


def test_a_rank_that_is_not_launched_is_waited_for_until_the_deadline():
    ranks = VirtualRanks(3, "cpu", mode="streams", timeout=3.0)
    x = ranks.empty(8).fill_(1.0)
    assert ranks.all_reduce(x).eq(3).all()
    ranks.arena.launch_parts = [part for part in ranks.arena.launch_parts if part.rank != 1]
    with pytest.raises(
        PeerTimeoutError, match=r"all_reduce: virtual rank 0 waited for rank 1, which did not"
    ) as e:
        ranks.all_reduce(x)
    assert (e.value.op, e.value.rank, e.value.peers) == ("all_reduce", 0, (1,))
    # It stays so: the ranks are out of step.
    with pytest.raises(PeerTimeoutError):
        ranks.barrier()


def test_rows_have_to_be_aligned():
    ranks = VirtualRanks(2, "cpu")
    with pytest.raises(ConfigError) as caught:
        ranks.all_reduce(torch.ones(2, 3))
    assert str(caught.value) == (
        "rows 12 bytes apart: those of virtual ranks begin at multiples of 16 bytes; "
        "make the tensor by VirtualRanks.empty()"
    )
    with pytest.raises(ConfigError, match=r"a tensor \[3, 4\] has not one row for each of 2 virtual ranks"):
        rows_of(torch.ones(3, 4), ranks.arena)
    with pytest.raises(ConfigError, match=r"x is \[3, 4\]; it must have a row for each of 2 virtual ranks"):
        ranks.all_reduce(torch.ones(3, 4))


def test_calls_that_would_go_wrong_on_a_gpu_are_refused_everywhere():
    ranks = VirtualRanks(2, "cpu", timeout=5.0)
    x = ranks.empty(8).fill_(1.0)
    z = ranks.empty(8, dtype=torch.complex64).fill_(1.0)
    memory = torch.zeros(64)
    for call, told in (
        (lambda: ranks.broadcast(z.conj(), 0), "x is conjugated or negated lazily"),
        (lambda: ranks.all_reduce(x.clone().requires_grad_()), "x requires a gradient"),
        (lambda: ranks.all_reduce(x, out=memory[:8].expand(2, 8)), "rows overlap"),
        (lambda: ranks.all_reduce(memory[:16].view(2, 8), out=memory[4:20].view(2, 8)), "out shares memory"),
        (
            lambda: ranks.all_gather_single(memory[:16].view(2, 8), out=memory[:32].view(2, 16)),
            "shares memory",
        ),
        (lambda: ranks.all_reduce([1.0]), "takes a torch.Tensor, not list"),
        (lambda: ranks.reduce_scatter_single(x, ""), "'' is not among"),
        (lambda: ranks.prepare(-1), "max_nbytes=-1 is not"),
        (lambda: ranks.prepare(8, torch.float32), "is no list"),
        (lambda: ranks.prepare(8, [], "sum"), "is no list"),
        (lambda: ranks.empty(-1), "negative length"),
        (lambda: VirtualRanks(2, "meta"), "device='meta' cannot be used here"),
        (lambda: VirtualRanks(True), "world_size=True"),
    ):
        with pytest.raises(ConfigError, match=told):
            call()
    both = torch.ones(2, 16)
    assert ranks.all_reduce(both[:, :8], out=both[:, 8:]).eq(2).all()
    assert ranks.all_reduce(x, out=x).eq(2).all()


def test_prepare_never_makes_less_room():
    ranks = VirtualRanks(2, "cpu")
    before = ranks.arena.staging
    ranks.prepare(1024)
    assert ranks.arena.staging is before
    ranks.prepare(64 << 20)
    assert ranks.arena.staging.layout.slot_bytes >= 64 << 20


def test_an_error_names_the_call_that_it_is_of():
    ranks = VirtualRanks(2, "cpu", timeout=7.0)
    x = ranks.empty(8).fill_(1.0)
    ranks.all_reduce(x)
    ranks.all_gather_single(x, timeout=50.0)
    call, _ = ranks.arena.channel._recent[0]
    record = ranks.arena.records[1]
    record[HostWord.EXPECTED], record[HostWord.ERROR] = call.signature, 2 | 0 << 8
    with pytest.raises(PeerTimeoutError, match=r"^all_reduce: virtual rank 1 waited for rank 0.* \(7 s\)"):
        ranks.barrier()


@pytest.mark.parametrize(
    ("timeout", "budget"), [(None, 1 << 62), (float("inf"), 1 << 62), (1e300, 1 << 62), (2.5, 2_500_000_000)]
)
def test_any_timeout_is_a_budget(timeout, budget):
    assert budget_of(timeout) == budget
