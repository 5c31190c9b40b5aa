"""What a buffer makes, when, and how it ends; the exchanges themselves are stand-ins."""

import gc

import pytest
import torch

from tcomm.errors import CapabilityError, ConfigError
from tcomm.groups.moe import buffer_memory
from tcomm.groups.moe.buffer_memory import BufferMemory
from tcomm.groups.stateless.group import StatelessProcessGroup

CPU = torch.device("cpu")


class Exchange:
    made = []  # noqa: RUF012

    def __init__(self, *args, **options):
        self.args, self.options, self.closed = args, options, 0
        Exchange.made.append(self)

    def close(self):
        self.closed += 1


class HighThroughput(Exchange):
    pass


class Masks:
    def __init__(self):
        self.masked, self.cleaned = [0, 0, 0, 0], 0

    def update(self, rank, is_masked):
        self.masked[rank] = int(is_masked)

    def query(self):
        return torch.tensor(self.masked, dtype=torch.int32)

    def clean(self):
        self.cleaned += 1


class LowLatency(Exchange):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.masks = Masks()


@pytest.fixture
def group(monkeypatch):
    monkeypatch.setattr(buffer_memory, "HighThroughput", HighThroughput)
    monkeypatch.setattr(buffer_memory, "LowLatency", LowLatency)
    monkeypatch.setattr(buffer_memory, "members_of", lambda group, name: name)
    monkeypatch.setattr(Exchange, "made", [])
    return StatelessProcessGroup(rank=1, world_size=4, store=None, socket=None)


def test_it_keeps_what_it_was_given(group):
    buffer = BufferMemory(group, 256, 512, True, 7, False, True, True, True)
    assert (buffer.group, buffer.rank, buffer.group_size) == (group, 1, 4)
    assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (256, 512)
    assert (buffer.low_latency_mode, buffer.explicitly_destroy, buffer.enable_shrink) == (True, True, True)
    assert Exchange.made == []


def test_wrong_sizes_and_groups_are_refused_at_once(group):
    for sizes in ((100, 0), (0, 100)):
        with pytest.raises(AssertionError, match="=100: give a multiple of 128"):
            BufferMemory(group, *sizes)
    with pytest.raises(CapabilityError, match="communicators of MPI"):
        BufferMemory(group, comm=object())
    with pytest.raises(ConfigError, match="group=None of a Buffer is no process group"):
        BufferMemory(None)


def test_each_exchange_is_made_at_its_first_call(group):
    buffer = BufferMemory(group, 256, 1 << 20, True, explicitly_destroy=True, timeout=3.0, engine="triton")
    first = buffer.high_throughput(CPU)
    assert buffer.high_throughput(CPU) is first
    options = {"timeout": 3.0, "device": CPU, "engine": "triton"}
    assert (first.args, first.options) == (("moe/high_throughput", 256), options)
    low = buffer.low_latency(4, 16, 8, CPU)
    assert buffer.low_latency(4, 16, 8, CPU) is low
    assert buffer.low_latency(8, 16, 8, CPU) is not low
    assert (low.args, low.options) == (("moe/low_latency", 4, 16, 8), options)
    assert low.masks.on_timeout == "raise"
    assert buffer.check_low_latency(4, 16, 8) is None
    buffer.destroy()
    buffer.destroy()
    assert [made.closed for made in Exchange.made] == [1, 1, 1]
    for use in (lambda: buffer.high_throughput(CPU), lambda: buffer.low_latency(4, 16, 8, CPU)):
        with pytest.raises(AssertionError, match="the Buffer was destroyed"):
            use()
    assert len(Exchange.made) == 3


def test_ranks_are_left_out_only_where_that_is_asked_for(group):
    buffer = BufferMemory(group, 256, 1 << 20, True, enable_shrink=True)
    assert buffer.masks() == []
    with pytest.raises(AssertionError, match=r"call low_latency_dispatch\(\) first"):
        buffer.low_latency_update_mask_buffer(2, True)
    first, second = buffer.low_latency(4, 16, 8, CPU), buffer.low_latency(8, 16, 8, CPU)
    assert first.masks.on_timeout == "mask"
    buffer.high_throughput(CPU)
    assert buffer.masks() == [first.masks, second.masks]
    buffer.low_latency_update_mask_buffer(2, True)
    second.masks.update(3, True)
    status = torch.full((4,), 7, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0, 0, 1, 1]
    buffer.low_latency_update_mask_buffer(3)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0, 0, 1, 0]
    with pytest.raises(
        AssertionError, match=r"other sizes needs memory of all ranks, and ranks \[2\] are mask"
    ):
        buffer.low_latency(16, 16, 8, CPU)
    assert buffer.low_latency(8, 16, 8, CPU) is second
    buffer.low_latency_clean_mask_buffer()
    assert (first.masks.cleaned, second.masks.cleaned) == (1, 1)
    with pytest.raises(AssertionError, match="enable_shrink=False leaves no rank out"):
        BufferMemory(group).masks()


def test_memory_that_is_not_there(group):
    buffer = BufferMemory(group, explicitly_destroy=True)
    with pytest.raises(AssertionError, match="num_nvl_bytes=0 has no memory"):
        buffer.high_throughput(CPU)
    for check in (lambda: buffer.check_low_latency(4, 16, 8), lambda: buffer.low_latency(4, 16, 8, CPU)):
        with pytest.raises(AssertionError, match="low_latency_mode=False"):
            check()
    small = BufferMemory(group, 0, 128, True)
    with pytest.raises(AssertionError, match=r"num_rdma_bytes=128 of the Buffer is less than the \d+ bytes"):
        small.check_low_latency(4, 16, 8)


def test_it_goes_with_the_object_or_when_it_is_told(group):
    buffer = BufferMemory(group, 256)
    buffer.high_throughput(CPU)
    with pytest.raises(AssertionError, match="`explicitly_destroy` flag must be set"):
        buffer.destroy()
    kept = BufferMemory(group, 256, explicitly_destroy=True)
    kept.high_throughput(CPU)
    del buffer, kept
    gc.collect()
    assert [made.closed for made in Exchange.made] == [1, 0]
