import pytest
import torch

from tcomm.groups.moe.high_throughput import HighThroughput
from tcomm.groups.moe.host_engine import HostEngine
from tcomm.groups.moe.jobs import CombineJob, DispatchJob
from tcomm.groups.moe.kernel_engine import KernelEngine
from tcomm.groups.setup import Membership
from tcomm.memory.exchange import LocalExchange

ENGINES = {"cpu": HostEngine, "triton": KernelEngine}
IDX = torch.tensor([[0, 3], [-1, -1], [1, -1]])


def check_alone(engine):
    """An engine of one rank, job by job; several ranks are those of `test_high_throughput`."""
    exchange = HighThroughput(Membership("alone", LocalExchange(), None, (0,)), 1 << 16, engine=engine)
    workspace, x, bias = exchange.workspace, torch.arange(24.0).view(3, 8), torch.ones(3, 8)
    found = ENGINES[engine](workspace)
    job = DispatchJob(x, None, IDX, None, None, 4, 1, 0, 20.0)
    received = workspace.run(lambda: found.dispatch(job))
    assert torch.equal(received.rows.view(torch.float32), x[[0, 2]])
    assert received.facts.tolist() == [[0, 3], [1, -1]]
    assert received.routing.row_slots.tolist() == [0, 2]
    assert received.routing.counts == [[2]]
    rows = received.rows.view(torch.float32)
    out, weights = workspace.run(
        lambda: found.combine(CombineJob(rows, received.routing, None, [bias], 20.0))
    )
    assert weights is None
    assert torch.equal(out, x * torch.tensor([[1.0], [0.0], [1.0]]) + 1)
    exchange.close()


def test_tokens_of_one_rank():
    check_alone("cpu")


def test_results_reuse_memory_that_nobody_holds():
    exchange = HighThroughput(Membership("alone", LocalExchange(), None, (0,)), 1 << 20, engine="cpu")
    x, idx = torch.ones(300, 128), torch.zeros(300, 1, dtype=torch.int64)
    first = exchange.dispatch(x, idx, None, 1).x
    where = first.data_ptr()
    assert exchange.dispatch(x, idx, None, 1).x.data_ptr() != where
    del first
    assert exchange.dispatch(x[:299], idx[:299], None, 1).x.data_ptr() == where
    exchange.close()


@pytest.mark.parametrize("engine", ["cpu", "triton"])
def test_an_exchange_has_the_engine_that_was_asked_for(engine):
    exchange = HighThroughput(Membership("alone", LocalExchange(), None, (0,)), 1 << 16, engine=engine)
    assert type(exchange._engine) is ENGINES[engine]
    exchange.close()
