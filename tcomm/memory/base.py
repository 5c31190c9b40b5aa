"""The contracts of symmetric memory: how ranks exchange bytes, who makes it, what kernels see of it."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from tcomm.memory.layout import StagingLayout
from tcomm.memory.runtime import Runtime
from tcomm.signature import CallDescription

__all__ = [
    "Exchange",
    "KernelArena",
    "KernelChannel",
    "LaunchPart",
    "NotShared",
    "Staging",
    "SymmetricBuffer",
    "Transport",
]


class Exchange(Protocol):
    """How the ranks of a group trade a few bytes while they set things up."""

    rank: int
    """This process, within the group."""
    world_size: int
    """Number of ranks in the group."""

    def all_gather(
        self, payload: bytes, timeout: float, check: Callable[[], None] | None = None
    ) -> list[bytes]:
        """Return every rank's payload, in rank order. **Collective.**

        Args:
            payload: what this rank gives, a few KiB at most.
            timeout: seconds.
            check: called now and then while waiting; what it raises ends the wait.

        Raises:
            RendezvousError: when some ranks did not come in time; names them.
        """
        ...

    def split(self, name: str) -> Exchange:
        """Another exchange of the same ranks, which meets no other; the same name on every rank."""
        ...


@dataclasses.dataclass(frozen=True)
class NotShared:
    """Why the ranks of a group cannot have symmetric memory. Every rank gets the same one."""

    reason: str
    """A sentence for the log and for `explain`."""


class SymmetricBuffer:
    """One buffer of equal size per rank, all of them addressable here.

    Attributes:
        rank: this process, within the group.
        world_size: number of ranks.
        nbytes: size of each rank's buffer, in bytes.
        table: [W] int64, base address of each rank's buffer as seen by this process. Kernels take it.
        unreachable: ranks whose buffers cannot be addressed here, and why; 0 in the table.
    """

    unreachable: Mapping[int, str] = types.MappingProxyType({})

    def __init__(self, rank: int, buffers: Sequence[torch.Tensor]) -> None:
        self.rank = rank
        self.world_size = len(buffers)
        self.nbytes = buffers[0].numel()
        self._buffers = tuple(buffers)
        addresses = [b.data_ptr() for b in buffers]
        self.table = torch.tensor(addresses, dtype=torch.int64, device=buffers[rank].device)

    @property
    def local(self) -> torch.Tensor:
        """[nbytes] uint8, this rank's own buffer."""
        return self._buffers[self.rank]

    def peer(
        self,
        rank: int,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype = torch.uint8,
        offset: int = 0,
    ) -> torch.Tensor:
        """A tensor over another rank's buffer, without a copy.

        Args:
            rank: whose buffer; may be this rank.
            shape: of the tensor; all that follows `offset` where None.
            dtype: of the tensor.
            offset: where it begins, in bytes, a multiple of the element size.

        Raises:
            IndexError: when the view would pass the end of the buffer.
        """
        if shape is None:
            return self._buffers[rank][offset:].view(dtype)
        wanted = math.prod(shape) * dtype.itemsize
        if offset < 0 or offset + wanted > self.nbytes:
            raise IndexError(f"{wanted} bytes at offset {offset} pass the end of a buffer of {self.nbytes}")
        return self._buffers[rank][offset : offset + wanted].view(dtype).view(tuple(shape))


class Transport(Protocol):
    """Makes symmetric buffers for one group."""

    name: str
    """As it appears in `explain` and in logs."""

    def allocate(self, nbytes: int, timeout: float) -> SymmetricBuffer | NotShared:
        """Make a zeroed buffer of `nbytes` on every rank and map all of them. **Collective.**

        Raises:
            CapabilityError: on every rank, when one of them lacks the room; says needed and available.
            RendezvousError: when a rank did not come in time.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Staging:
    """Staging memory of all ranks, and where things lie in it. Whoever holds it keeps it alive."""

    buffer: SymmetricBuffer
    """Every rank's staging, addressable here."""
    layout: StagingLayout
    """The same on all ranks."""
    multicast: int = 0
    """Address at which a store reaches the staging of all ranks; 0 where the fabric has none."""


@dataclasses.dataclass(frozen=True)
class LaunchPart:
    """One launch of a call, and the ranks that it works for."""

    rank: int
    """The first of them."""
    num_ranks: int = 1
    """How many there are: the size of the grid's y axis."""
    stream: Any = None
    """`torch.cuda.Stream` to launch on; None: the current one."""


class KernelChannel(Protocol):
    """What happens on the host before and after a kernel."""

    axis_rank: int
    """Which of the ranks of a launch is interpreted now."""

    def begin(self, call: CallDescription, timeout: float | None) -> int:
        """Take the next epoch, or raise what ended the group."""
        ...

    def after_kernel(self, epoch: int, everyone: bool = False) -> None:
        """Raise what the kernel found, as far as it is known by now; `everyone`: as in `Channel`."""
        ...

    def kernel_pause(self, phase: int, block: int, word: int) -> int:
        """Let peers run while an interpreted kernel waits; 1 to give the wait up, else 0."""
        ...


class KernelArena(Protocol):
    """The memory of a group, as kernels and their launchers see it, on whatever device."""

    @property
    def rank(self) -> int:
        """This process, within the group; 0 where it is all of them."""
        ...

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the memory is."""
        ...

    @property
    def is_virtual(self) -> bool:
        """Whether this process is every rank, and a tensor has a row for each."""
        ...

    @property
    def max_blocks(self) -> int:
        """Programs of a rank that are on the device at once, with those of all ranks that share it."""
        ...

    @property
    def staging(self) -> Staging | None:
        """Where messages pass; None until it is made."""
        ...

    @property
    def control(self) -> SymmetricBuffer:
        """Control pages."""
        ...

    @property
    def channel(self) -> KernelChannel:
        """Of this process."""
        ...

    @property
    def runtime(self) -> Runtime:
        """Streams of the device."""
        ...

    @property
    def launch_parts(self) -> Sequence[LaunchPart]:
        """The launches that make one call in this process."""
        ...
