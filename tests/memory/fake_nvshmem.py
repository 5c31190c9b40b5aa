"""Stands for nvshmem4py: the few functions that tcomm calls, over shared memory of processes."""

import ctypes
import enum
import types

import numpy as np
import torch

from tcomm.kernels.heap import Heap
from tcomm.memory.nvshmem import Nvshmem4py
from tcomm.memory.shm import SharedMemoryTransport


class _InitStatus(enum.IntEnum):
    STATUS_NOT_INITIALIZED = 0
    STATUS_IS_BOOTSTRAPPED = 1
    STATUS_IS_INITIALIZED = 2


class _UniqueId:
    def __init__(self, data):
        self._data = (
            np.frombuffer(data, dtype=[("version", "<i4"), ("internal", "S124")]).copy().view(np.recarray)
        )


class FakeNvshmem:
    """One rank's NVSHMEM.

    Attributes:
        log: what was called, in order.
    """

    def __init__(
        self, exchange, near=None, version="3.8.0", running=False, pe=None, n_pes=None, room=1 << 30
    ):
        self.exchange = exchange
        self.near = set(range(exchange.world_size)) if near is None else near
        self.version = version
        self.running = running
        self.pe = exchange.rank if pe is None else pe
        self.count = exchange.world_size if n_pes is None else n_pes
        self.room = room
        self.init_error = ""
        self.log = []
        self._buffers = {}

    def library(self, device=0, capability=90):
        core = types.SimpleNamespace(
            InitStatus=_InitStatus,
            init_status=lambda: 2 if self.running else 0,
            get_version=lambda: types.SimpleNamespace(libnvshmem_version=self.version),
            get_unique_id=lambda empty: _UniqueId(bytes(128) if empty else bytes(range(1, 129))),
            init=self._init,
            finalize=self._finalize,
            my_pe=lambda: self.pe,
            n_pes=lambda: self.count,
        )
        bindings = types.SimpleNamespace(
            malloc=self._malloc,
            free=lambda address: self._must_run(f"free {self._buffers.pop(address).nbytes}"),
            ptr=self._ptr,
            cumodule_init=lambda module: self.log.append(f"initialise module {module}"),
            cumodule_finalize=lambda module: self.log.append(f"finalise module {module}"),
        )
        return Nvshmem4py(
            core, bindings, f"device {device}", tensor_at, lambda: self.log.append("sync"), capability
        )

    def _must_run(self, what):
        assert self.running, f"{what} while NVSHMEM does not run"
        self.log.append(what)

    def _init(self, *, device, uid, rank, nranks, initializer_method):
        assert initializer_method == "uid"
        assert uid._data.tobytes() == bytes(range(1, 129)), "not the unique id of rank 0"
        self.log.append(f"init {device} {rank}/{nranks}")
        if self.init_error:
            raise RuntimeError(self.init_error)
        self.exchange.all_gather(b"init", 20.0)
        self.running = True

    def _finalize(self):
        self._must_run("finalize")
        self.running = False

    def _malloc(self, nbytes):
        self._must_run(f"malloc {nbytes}")
        if nbytes > self.room:
            return 0
        buffer = SharedMemoryTransport(self.exchange).allocate(nbytes, 20.0)
        buffer.local[:] = 77
        self._buffers[buffer.local.data_ptr()] = buffer
        return buffer.local.data_ptr()

    def heap(self, *args):
        """What interpreted kernels put into: all that was allocated, however far away."""
        return _FakeHeap(self, *args)

    def _ptr(self, address, pe):
        buffer = self._buffers[address]
        peer = pe - self.pe + self.exchange.rank
        return int(buffer.table[peer]) if peer in self.near else 0


class _FakeHeap(Heap):
    def __init__(self, fake, *args):
        super().__init__(*args)
        self._fake = fake

    def translate(self, address, pe):
        fake = self._fake
        for buffer in fake._buffers.values():
            offset = address - buffer.local.data_ptr()
            if 0 <= offset < buffer.nbytes:
                return int(buffer.table[pe - fake.pe + fake.exchange.rank]) + offset
        raise AssertionError(f"{address:#x} was not allocated")


def tensor_at(address, nbytes):
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)


def install(root, version="3.8.0", architectures=(80, 90), old=False):
    """Make a directory that looks like an installed NVSHMEM; returns it as text."""
    (root / "lib").mkdir(parents=True)
    header = root / "include" / "non_abi" / "nvshmem_version.h"
    header.parent.mkdir(parents=True)
    numbers = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    header.write_text("".join(f"#define NVSHMEM_VENDOR_{name}_VERSION {n}\n" for name, n in numbers))
    for architecture in architectures:
        (root / "lib" / f"libnvshmem_device_sm_{architecture}.bc").write_bytes(b"BC")
    if old:
        (root / "lib" / "libnvshmem_device.bc").write_bytes(b"BC")
    return str(root)
