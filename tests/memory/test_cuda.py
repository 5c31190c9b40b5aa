"""The one object that speaks to torch, against a stand-in for torch's own module."""

import contextlib
import datetime
import logging

import pytest
import torch
import torch.distributed as dist

from tcomm.config import let_ranks_share_a_device
from tcomm.memory import cuda
from tcomm.memory.cuda import CudaTransport, DeviceBuffer, TorchSymmetricMemory
from tcomm.memory.exchange import LocalExchange


class Handle:
    """Of two ranks; `pad` bytes lie in front of the data, as in newer versions of torch."""

    def __init__(self, tensor, whole, pad, multicast, skew=0):
        self.peer = torch.zeros(pad + tensor.numel() + skew, dtype=torch.uint8)
        self.whole, self.pad, self.skew, self.multicast_ptr = whole, pad, skew, multicast
        self.buffer_ptrs = [whole.data_ptr(), self.peer.data_ptr()]

    def get_buffer(self, rank, sizes, dtype, storage_offset=0):
        memory = self.peer[self.skew :] if rank == 1 else self.whole
        return memory[self.pad :].view(dtype)[: sizes[0]]


class FakeTorch:
    """`torch._C._distributed_c10d._SymmetricMemory`, as far as it is used."""

    def __init__(self, backend="CUDA", pad=0, multicast=0, skew=0):
        self.backend, self.pad, self.multicast, self.skew = backend, pad, multicast, skew
        self.groups, self.timeouts = [], []

    def get_backend(self, device):
        return self.backend

    def has_multicast_support(self, kind, index):
        return index == 0

    def set_group_info(self, name, rank, world_size, store):
        assert isinstance(store, dist.PrefixStore)
        self.groups.append((name, rank, world_size))

    def empty_strided_p2p(self, size, stride, dtype, device):
        self.whole = torch.full((self.pad + size[0],), 9, dtype=dtype)
        return self.whole[self.pad :]

    def rendezvous(self, tensor, name):
        self.timeouts.append(self.store.timeout)
        return Handle(tensor, self.whole, self.pad, self.multicast, self.skew)


@pytest.fixture
def torch_memory(monkeypatch):
    def make(**options):
        fake = FakeTorch(**options)
        fake.store = dist.HashStore()
        fake.store.set_timeout(datetime.timedelta(seconds=77))
        monkeypatch.setattr(cuda, "_torch", lambda: fake)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        return fake, TorchSymmetricMemory(torch.device("cuda", 0), fake.store, "tcomm/g/1", "host")

    return make


@pytest.mark.parametrize("pad", [0, 9216])
def test_buffers_and_multicast_begin_where_the_data_does(torch_memory, pad):
    fake, memory = torch_memory(pad=pad, multicast=1 << 44)
    tensor = memory.empty(4096)
    assert not tensor.any()
    mapped = memory.rendezvous(tensor, 0, 2, 5.0)
    assert mapped.buffers[0].data_ptr() == tensor.data_ptr()
    assert mapped.buffers[1].data_ptr() == mapped.handle.peer.data_ptr() + pad
    assert mapped.multicast == (1 << 44) + pad
    assert memory.rendezvous(memory.empty(64), 0, 2, 5.0).multicast
    assert fake.groups == [("tcomm/g/1", 0, 2)]


def test_torch_waits_no_longer_than_asked_and_the_store_gets_its_own_timeout_back(torch_memory):
    fake, memory = torch_memory()
    mapped = memory.rendezvous(memory.empty(64), 0, 2, 5.0)
    assert fake.timeouts == [datetime.timedelta(seconds=5)]
    assert fake.store.timeout == datetime.timedelta(seconds=77)
    assert mapped.multicast == 0


def test_a_mapping_of_another_shape_is_refused(torch_memory):
    _, memory = torch_memory(skew=64)
    with pytest.raises(RuntimeError, match="torch maps rank 1 at another offset than rank 0"):
        memory.rendezvous(memory.empty(128), 0, 2, 5.0)


def test_what_torch_has_not_is_a_reason(torch_memory, monkeypatch):
    assert torch_memory()[1].why_not() == ""
    assert torch_memory()[1].why_no_multicast() == ""
    memory = torch_memory(backend="NVSHMEM")[1]
    assert memory.why_not() == "torch's symmetric memory uses backend NVSHMEM; unset TORCH_SYMMMEM"
    memory.device = torch.device("cuda", 1)
    assert memory.why_no_multicast() == "the driver says that the device has no multicast"
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert memory.why_not() == "this torch is built without CUDA"


def test_the_names_that_are_used_exist_in_this_torch():
    real = cuda._torch()
    used = ["get_backend", "has_multicast_support", "set_group_info", "empty_strided_p2p", "rendezvous"]
    used += ["buffer_ptrs", "multicast_ptr", "get_buffer"]
    assert [name for name in used if not hasattr(real, name)] == []
    assert TorchSymmetricMemory(torch.device("cuda", 0), None, "g", "host").why_not()


def test_a_part_of_a_buffer_has_its_part_of_the_multicast_address():
    buffer = DeviceBuffer(0, [torch.arange(16, dtype=torch.uint8)] * 2, 1000)
    part = buffer.part(4, 8)
    assert (part.multicast, part.nbytes, int(part.local[0])) == (1004, 8, 4)
    assert DeviceBuffer(0, [torch.zeros(4)]).part(1, 2).multicast == 0


def test_handles_outlive_whoever_made_them_until_they_are_released(torch_memory):
    _, memory = torch_memory()
    waits = []

    class Timed(LocalExchange):
        def all_gather(self, payload, timeout, check=None):
            waits.append(timeout)
            return [payload]

    transport = CudaTransport(Timed(), memory)
    memory.identity, real = lambda: "this one", memory.rendezvous
    memory.rendezvous = lambda tensor, rank, world, timeout: real(tensor, rank, 2, timeout)
    made = transport.allocate(4096, 5.0)
    assert made.nbytes == 4096
    # Who failed at once waits for who is still in torch's rendezvous.
    assert waits == [5.0, 10.0]
    held = list(transport._mine)
    assert all(key in cuda._never_collected for key in held)
    transport.release()
    assert not any(key in cuda._never_collected for key in held)
    transport.release()


def test_torch_is_told_of_shared_devices_once(monkeypatch, caplog):
    monkeypatch.delenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", raising=False)
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "0")
    with caplog.at_level(logging.INFO, "tcomm"):
        let_ranks_share_a_device()
        let_ranks_share_a_device()
    assert [r.getMessage() for r in caplog.records] == [
        "TCOMM_ALLOW_SHARED_DEVICE: set TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1 for torch in this process"
    ]
