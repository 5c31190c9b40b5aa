"""A rank of several nodes for tests of compiled launches: host memory, an NVSHMEM that writes down."""

import types

import torch

from tcomm.memory.device_arena import DeviceArena, open_device_arena
from tcomm.memory.nvshmem import Nvshmem4py, NvshmemTransport
from tests.memory.fake_nvshmem import tensor_at

WORLD, NODES, RANK, PES = 4, 2, 1, (7, 3, 5, 11)


class Everyone:
    """An exchange whose other ranks say what this one says."""

    rank, world_size = RANK, WORLD

    def all_gather(self, payload, timeout, check=None):
        return [payload] * WORLD

    def split(self, prefix):
        return self


class Library:
    """Attributes: log: what was called of NVSHMEM, in order."""

    def __init__(self):
        self.log = []
        self._memory = {}
        bindings = types.SimpleNamespace(
            malloc=self._malloc,
            free=lambda address: self.log.append("free"),
            ptr=lambda address, pe: address if PES.index(pe) // 2 == RANK // 2 else 0,
            cumodule_init=lambda module: self.log.append(f"initialise {module}"),
            cumodule_finalize=lambda module: self.log.append(f"finalise {module}"),
        )
        core = types.SimpleNamespace(finalize=lambda: self.log.append("finalize"))
        self.library = Nvshmem4py(core, bindings, None, tensor_at, lambda: None, 90)

    def _malloc(self, nbytes):
        memory = torch.zeros(nbytes + 512, dtype=torch.uint8)
        address = (memory.data_ptr() + 511) // 512 * 512
        self._memory[address] = memory
        return address

    def arena(self, bitcode) -> DeviceArena:
        """Of rank 1, whose mate is rank 0, that takes host memory for that of a GPU."""
        transport = NvshmemTransport(Everyone(), self.library, PES, True, bitcode)
        arena = open_device_arena(
            "nodes", Everyone(), transport, torch.device("cpu"), None, 1 << 20, 1.0, None
        )
        assert isinstance(arena, DeviceArena)
        arena.device = torch.device("cuda", 0)
        return arena
