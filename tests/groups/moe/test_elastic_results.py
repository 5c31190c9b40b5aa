import gc

import pytest
import torch

from tcomm.errors import UsageError
from tcomm.groups.moe.elastic_results import ElasticHandle, KeptResults, Receive
from tcomm.groups.moe.low_latency_calls import LowLatencyHandle, Packed
from tcomm.memory.moe_slots import RowFormat, SlotLayout

MOST, NOW = SlotLayout(3, 1, 2, 1, 8, 2), SlotLayout(2, 1, 2, 1, 8, 2)
FORM = RowFormat(8, torch.bfloat16)


class _Exchange:
    layout = NOW

    def __init__(self):
        self.alive = []

    def is_alive(self, inner):
        return any(inner is one for one in self.alive)


def _result(kept, exchange, number=0):
    inner = LowLatencyHandle(Packed(number, NOW, torch.device("cpu")), NOW, torch.zeros(1, 1))
    exchange.alive.append(inner)
    handle = ElasticHandle(exchange, inner, kept.find_room(exchange))
    kept.hold(handle)
    return handle


def test_memory_is_its_results_until_it_is_combined_or_dropped():
    kept, exchange, other = KeptResults(MOST, torch.device("cpu")), _Exchange(), _Exchange()
    first, second = _result(kept, exchange), _result(kept, exchange)
    assert (first.packed.number, second.packed.number) == (0, 1)
    assert [*first][2:] == [2, 8]
    assert next(iter(first)) is first.packed.src_info
    assert [*first][1].shape == (1, 3)
    with pytest.raises(UsageError, match="2 results are alive"):
        kept.find_room(exchange, None)
    assert kept.find_room(other).number == 0
    exchange.alive.pop()
    assert kept.find_room(exchange) is second.packed
    del first
    gc.collect()
    assert kept.find_room(exchange).number == 0


def test_what_came_is_put_where_results_lie():
    kept, exchange = KeptResults(MOST, torch.device("cpu")), _Exchange()
    handle, calls = _result(kept, exchange), []
    rows = handle.inner.packed.rows_as(FORM).copy_(torch.arange(32).view(1, 4, 8))
    handle.inner.packed.counts.fill_(3)
    handle.inner.packed.ranges.fill_(5)
    handle.packed.ranges.fill_(9)
    receive = Receive(lambda: calls.append(1), handle, FORM)
    receive()
    receive()
    assert calls == [1]
    assert torch.equal(handle.packed.rows_as(FORM)[:, :4], rows)
    assert (handle.packed.counts.tolist(), handle.packed.ranges.tolist()) == ([3], [[5, 5, 0]])
    late = Receive(lambda: calls.append(2), handle, FORM)
    exchange.alive.clear()
    handle.packed.counts.fill_(1)
    late()
    assert calls == [1, 2]
    assert handle.packed.counts.tolist() == [1]
