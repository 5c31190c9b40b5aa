"""What stands in for torch's symmetric memory and its device: POSIX shared memory."""

from __future__ import annotations

import contextlib
import itertools
import time

import torch

from tcomm.groups.moe.workspace import Workspace
from tcomm.memory.cuda import CudaTransport, Mapped
from tcomm.memory.device_arena import DeviceArena, open_device_arena
from tcomm.memory.shm import SharedMemoryTransport
from tests.ranks import Member


class FakeSymmetricMemory:
    """Symmetric memory between processes on a CPU, which fails where it is told to."""

    def __init__(self, exchange, device="", *, broken="", too_large=0, stuck=0.0, reason="", multicast=0):
        self.entered = 0
        self.settled = 0
        self._transport = SharedMemoryTransport(exchange)
        self._device = device or f"device {exchange.rank}"
        self._broken, self._too_large, self._stuck, self._reason = broken, too_large, stuck, reason
        self._multicast = multicast

    def why_not(self):
        return self._reason

    def why_no_multicast(self):
        return "" if self._multicast else "this is a CPU"

    def identity(self):
        return self._device

    def room(self):
        return self._too_large

    def empty(self, nbytes):
        if self._too_large and nbytes > self._too_large:
            raise RuntimeError("CUDA driver error: out of memory\nand a long trace")
        return torch.zeros(nbytes, dtype=torch.uint8)

    def rendezvous(self, tensor, rank, world_size, timeout):
        self.entered += 1
        if self._stuck:
            time.sleep(self._stuck)
        if self._broken:
            raise RuntimeError(self._broken)
        made = self._transport.allocate(tensor.numel(), timeout)
        return Mapped([made.peer(r) for r in range(world_size)], self._multicast, made)

    def settle(self):
        self.settled += 1


class LyingMemory(FakeSymmetricMemory):
    """Gives a peer's buffer out that is really this rank's own: peer access that was only promised."""

    def __init__(self, exchange, about, **options):
        super().__init__(exchange, **options)
        self._about = about

    def rendezvous(self, tensor, rank, world_size, timeout):
        mapped = super().rendezvous(tensor, rank, world_size, timeout)
        buffers = list(mapped.buffers)
        for peer in self._about:
            buffers[peer] = torch.zeros_like(buffers[peer])
        return Mapped(buffers, mapped.multicast, mapped)


class FakeRuntime:
    """The calls of the CUDA runtime that are used, with streams that are numbers."""

    def __init__(self):
        self.stream = 1
        self.captures = {}
        self.waits = []

    def current_stream(self):
        return self.stream

    def capture_id(self, stream):
        return self.captures.get(stream, 0)

    def let_wait(self, waiting, awaited):
        self.waits.append((waiting, awaited))

    def refuse_in_capture(self, what):
        from tcomm.errors import CapabilityError

        if self.capture_id(self.stream):
            raise CapabilityError(f"{what}, ... call prepare(max_nbytes, dtypes) before the capture")

    def on_device(self):
        return contextlib.nullcontext()


def transport_of(member: Member, memory=None, allow_shared_device=False, name="device") -> CudaTransport:
    memory = memory or FakeSymmetricMemory(member.exchange(f"{name}/memory"))
    return CudaTransport(member.exchange(f"{name}/transport"), memory, allow_shared_device)


def device_arena(
    member: Member, memory=None, host=None, staging_bytes=1 << 20, name="device", prove=None
) -> DeviceArena:
    """An arena on a pretended device, opened by all ranks."""
    made = open_device_arena(
        name,
        member.exchange(f"{name}/arena"),
        transport_of(member, memory, name=name),
        torch.device("cpu"),
        host,
        staging_bytes,
        20.0,
        prove,
    )
    assert isinstance(made, DeviceArena), made
    return made


def give_workspaces_device_memory(member: Member) -> None:
    """Let workspaces have a device's memory, which kernels see, apart from the host's."""
    count = itertools.count()

    def make_memory(space, nbytes):
        arena = device_arena(
            member, host=space.host_arena.channel, staging_bytes=nbytes, name=f"device {next(count)}"
        )
        space._devices.arena = arena
        return arena

    Workspace._make_memory = make_memory


@contextlib.contextmanager
def on_device(member: Member, **options):
    """A host arena, and a device arena beside it."""
    host = member.arena(name="host")
    arena = device_arena(member, host=host.channel, **options)
    try:
        yield arena
    finally:
        arena.close()
        host.close("the test is over")
