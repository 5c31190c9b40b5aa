import time

import torch

from tcomm.kernels.bound import launches
from tests.groups.moe.low_latency_cases import (
    Case,
    as_experts_see,
    make,
    mistakes_of,
    run_case,
    tokens_of,
    wanted_sum,
)


def _without_the_other(exchange):
    """What is wrong when each rank leaves the other out: nothing goes over the wire."""
    rank, layout, case = exchange.workspace.rank, exchange.layout, Case(4, 4, "full", fp8=("use_fp8",))
    exchange.masks.update(1 - rank, True)
    sent, out = exchange.workspace.traffic.wire_nbytes, run_case(exchange, case)[-1]
    given = as_experts_see(case, tokens_of(case, layout, rank)[0])
    found = [] if torch.equal(out, wanted_sum(case, layout, rank, given, masked={1 - rank})) else ["alone"]
    return found + [f"{n} bytes" for n in (exchange.workspace.traffic.wire_nbytes - sent,) if n]


def _by_kernels(member):
    exchange = make(member, engine="triton", num_max_tokens=3, num_experts=4)
    found = mistakes_of(exchange, Case(1, 3, fp8=("use_fp8",)))
    found += mistakes_of(exchange, Case(2, 4, "holes", zero_copy=True, hook=True))
    stats, waits = torch.ones(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    x, topk_idx, _ = tokens_of(Case(3, 2, "full"), exchange.layout, member.rank)
    member.meet("before one is late")
    if member.rank == 1:
        time.sleep(0.3)
    counts = exchange.dispatch(x, topk_idx, cumulative_recv_stats=stats, wait_recv_cost_stats=waits)[1]
    phases = exchange.workspace.traffic.num_phases
    added = stats.tolist() == (counts + 1).tolist()
    alone = _without_the_other(exchange)
    member.meet("alone")
    exchange.close()
    names = [
        "_plan_kernel",
        "_send_copies_kernel",
        "_receive_copies_kernel",
        "_send_rows_kernel",
        "_sum_rows_kernel",
    ]
    return (
        found + alone,
        added,
        waits.tolist(),
        phases,
        [launches[n] for n in names],
    )


def test_each_part_of_a_call_is_a_launch(on_ranks):
    for rank, (found, added, waits, phases, launched) in enumerate(on_ranks(2, _by_kernels)):
        assert found == []
        assert added
        assert waits[rank] == 0
        assert waits[1 - rank] > (200_000 if rank == 0 else 0)
        assert phases == 5
        assert launched == [4, 4, 4, 3, 3]
