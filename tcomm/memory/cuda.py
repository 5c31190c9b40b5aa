"""Symmetric memory between GPUs, by torch. The only file that touches torch's private module for it.

Nobody enters torch's own rendezvous, which has no way out, before every rank has said that it is ready; what
one rank lacks is every rank's answer. Memory is given back by `release` and never by the garbage collector:
the destructors of torch's handles wait for the device, whose kernels may be waiting for a peer.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
import torch
import torch.distributed as dist

from tcomm.config import let_ranks_share_a_device
from tcomm.errors import CapabilityError, GroupMismatchError
from tcomm.memory.base import Exchange, NotShared, SymmetricBuffer

__all__ = ["CudaTransport", "DeviceBuffer", "Mapped", "SymmetricMemory", "TorchSymmetricMemory"]

logger = logging.getLogger("tcomm")

_never_collected: dict[int, object] = {}
"""What torch made, by id, until somebody releases it."""


@dataclasses.dataclass(frozen=True)
class Mapped:
    """One allocation of every rank, mapped here."""

    buffers: Sequence[torch.Tensor]
    """[nbytes] uint8 of each rank, on this rank's device."""
    multicast: int = 0
    """Address at which a store reaches all of them; 0 where there is none."""
    handle: object = None
    """What keeps the mapping alive."""


class SymmetricMemory(Protocol):
    """What is needed of torch and its device. A test stands in for it."""

    def why_not(self) -> str:
        """Why there is none here; empty where there is."""
        ...

    def why_no_multicast(self) -> str:
        """Why the device has no multicast addresses; empty where it should have."""
        ...

    def identity(self) -> str:
        """Of the device, in the whole world."""
        ...

    def room(self) -> int:
        """Free bytes of the device."""
        ...

    def empty(self, nbytes: int) -> torch.Tensor:
        """[nbytes] uint8, zeroed, that peers will be able to map. Raises RuntimeError without the room."""
        ...

    def rendezvous(self, tensor: torch.Tensor, rank: int, world_size: int, timeout: float) -> Mapped:
        """Map what every rank made by `empty`. **Collective.**"""
        ...

    def settle(self) -> None:
        """Wait until the device has done all that it was given."""
        ...


class TorchSymmetricMemory:
    """Symmetric memory of torch 2.11 and later, with its `CUDA` backend.

    Args:
        device: with an index.
        store: `torch.distributed.Store` that the ranks share.
        key: name of the group for torch, and of its keys; the same on every rank, used by no other group.
        host: identity of this machine.
        group: of the same ranks, where there is one; let go once torch knows it.
    """

    def __init__(
        self,
        device: torch.device,
        store: Any,
        key: str,
        host: str,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.device = device
        self._group = group
        self._store = store
        self._key = key
        self._host = host
        self._joined = False

    def why_not(self) -> str:
        """Why torch has no symmetric memory for the device; empty when it has."""
        if torch.version.cuda is None and torch.version.hip is None:
            return "this torch is built without CUDA"
        try:
            backend = _torch().get_backend(self.device)
        except (ImportError, RuntimeError) as error:
            return f"torch has no symmetric memory: {error}"
        if backend != "CUDA":
            return f"torch's symmetric memory uses backend {backend}; unset TORCH_SYMMMEM"
        return ""

    def why_no_multicast(self) -> str:
        """Why the device has no multicast addresses; empty where it should have."""
        if _torch().has_multicast_support(torch._C._autograd.DeviceType.CUDA, self.device.index):
            return ""
        return "the driver says that the device has no multicast"

    def identity(self) -> str:
        """Host and UUID."""
        properties: Any = torch.cuda.get_device_properties(self.device)
        return f"{self._host}/{getattr(properties, 'uuid', self.device.index)}"

    def room(self) -> int:
        """Free bytes of the device."""
        return int(torch.cuda.mem_get_info(self.device)[0])

    def empty(self, nbytes: int) -> torch.Tensor:
        """[nbytes] uint8, zeroed."""
        with torch.cuda.device(self.device):
            made: torch.Tensor = _torch().empty_strided_p2p((nbytes,), (1,), torch.uint8, self.device)
            made.zero_()
        self.settle()
        return made

    def rendezvous(self, tensor: torch.Tensor, rank: int, world_size: int, timeout: float) -> Mapped:
        """Map what every rank made. Torch waits at the store, for at most `timeout` seconds there."""
        memory, before = _torch(), self._store.timeout
        self._store.set_timeout(datetime.timedelta(seconds=timeout))
        try:
            if not self._joined:
                if self._group is not None:
                    # Newer versions of torch look the group up by its name, older ones want to be told of it.
                    _register(self._key, self._group)
                    self._group = None
                # Keys of its own: torch counts rounds per group, and others may use the store.
                own = dist.PrefixStore(f"{self._key}/memory", self._store)  # type: ignore[attr-defined]
                memory.set_group_info(self._key, rank, world_size, own)
                self._joined = True
            with torch.cuda.device(self.device):
                handle = memory.rendezvous(tensor, self._key)
        finally:
            self._store.set_timeout(before)
        # Older versions put their signal pad behind the data, newer ones in front of it.
        offset = tensor.data_ptr() - handle.buffer_ptrs[rank]
        buffers = [handle.get_buffer(r, (tensor.numel(),), torch.uint8) for r in range(world_size)]
        for r, buffer in enumerate(buffers):
            if buffer.data_ptr() != handle.buffer_ptrs[r] + offset:
                raise RuntimeError(f"torch maps rank {r} at another offset than rank {rank}")
        multicast = int(handle.multicast_ptr or 0)
        return Mapped(buffers, multicast + offset if multicast else 0, handle)

    def settle(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self.device)


def _register(name: str, group: dist.ProcessGroup) -> None:
    register: Any = torch._C._distributed_c10d._register_process_group
    register(name, group)


def _torch() -> Any:
    from torch._C._distributed_c10d import _SymmetricMemory

    return _SymmetricMemory


class DeviceBuffer(SymmetricBuffer):
    """A symmetric buffer on GPUs.

    Attributes:
        multicast: address at which a store reaches every rank's buffer; 0 where there is none.
    """

    def __init__(self, rank: int, buffers: Sequence[torch.Tensor], multicast: int = 0) -> None:
        super().__init__(rank, buffers)
        self.multicast = multicast

    def part(self, start: int, nbytes: int) -> DeviceBuffer:
        """The same range of every rank's buffer."""
        parts = [buffer[start : start + nbytes] for buffer in self._buffers]
        return DeviceBuffer(self.rank, parts, self.multicast + start if self.multicast else 0)


class _Offer(msgspec.Struct, frozen=True):
    """What a rank says before torch's rendezvous, and after it."""

    nbytes: int = 0
    device: str = ""
    lacking: str = ""
    problem: str = ""


class CudaTransport:
    """Makes symmetric buffers on GPUs for one group.

    Args:
        exchange: reaches the other ranks.
        memory: torch's, or what stands in for it.
        allow_shared_device: let several ranks use one device.
    """

    name = "CUDA"

    def __init__(
        self, exchange: Exchange, memory: SymmetricMemory, allow_shared_device: bool = False
    ) -> None:
        self.memory = memory
        self._exchange = exchange
        self._allow_shared_device = allow_shared_device
        self._mine: list[int] = []

    def allocate(
        self, nbytes: int, timeout: float, check: Callable[[], None] | None = None
    ) -> DeviceBuffer | NotShared:
        """Make a zeroed buffer of `nbytes` on every rank's device and map all of them. **Collective.**

        Args:
            nbytes: the same on every rank.
            timeout: seconds for each of its steps.
            check: called while this rank waits for others; what it raises ends the wait.

        Raises:
            CapabilityError: on every rank, when one of them lacks the room; says needed and available.
            GroupMismatchError: on every rank, when they want different sizes.
            RendezvousError: when a rank did not come in time.
        """
        tensor, offer = self._make(nbytes)
        offers = self._gather(offer, timeout, check)
        self._refuse(offers, nbytes)
        reasons = [f"rank {r}: {o.problem}" for r, o in enumerate(offers) if o.problem]
        if shared := self._sharing(offers):
            reasons.append(shared)
        if reasons or tensor is None:
            return NotShared("the GPUs share no memory (" + "; ".join(reasons) + ")")
        mapped, problem = self._enter(tensor, timeout)
        # Another rank may still be where this one failed at once.
        verdicts = self._gather(_Offer(problem=problem), 2 * timeout, check)
        reasons = [f"rank {r}: {v.problem}" for r, v in enumerate(verdicts) if v.problem]
        if mapped is None or reasons:
            return NotShared("the GPUs share no memory (" + "; ".join(reasons) + ")")
        return DeviceBuffer(self._exchange.rank, mapped.buffers, mapped.multicast)

    def settle(self) -> None:
        """Wait until the device has done all that it was given."""
        self.memory.settle()

    def why_no_multicast(self) -> str:
        """Why its buffers have no multicast address, where they have none."""
        if self._allow_shared_device:
            return "TCOMM_ALLOW_SHARED_DEVICE gives multicast up"
        return self.memory.why_no_multicast() or "torch gave the memory no multicast address"

    def keep(self, thing: object) -> None:
        """Keep what kernels may use from the garbage collector, until `release`."""
        _never_collected[id(thing)] = thing
        self._mine.append(id(thing))

    def release(self) -> None:
        """Give everything back, with nothing in flight on the device. May be called twice."""
        for key in self._mine:
            _never_collected.pop(key, None)
        self._mine.clear()

    def _make(self, nbytes: int) -> tuple[torch.Tensor | None, _Offer]:
        """This rank's memory, or an offer that tells the others why there is none."""
        if problem := self.memory.why_not():
            return None, _Offer(nbytes, problem=problem)
        if self._allow_shared_device:
            let_ranks_share_a_device()
        try:
            tensor = self.memory.empty(nbytes)
        except RuntimeError as error:
            first = str(error).strip().partition("\n")[0]
            return None, _Offer(
                nbytes, lacking=f"{first}: needed {nbytes} bytes, available {self.memory.room()}"
            )
        self.keep(tensor)
        return tensor, _Offer(nbytes, self.memory.identity())

    def _enter(self, tensor: torch.Tensor, timeout: float) -> tuple[Mapped | None, str]:
        """Torch's rendezvous, in a thread that can be left behind; the second value says what went wrong."""
        rank, world_size = self._exchange.rank, self._exchange.world_size
        done: list[Mapped] = []
        problems: list[str] = []

        def enter() -> None:
            try:
                mapped = self.memory.rendezvous(tensor, rank, world_size, timeout)
                self.keep(mapped.handle)
                self.keep(mapped)
                done.append(mapped)
            except Exception as error:  # noqa: BLE001 - told to every rank, which raises
                problems.append(str(error).strip().partition("\n")[0] or type(error).__name__)

        thread = threading.Thread(target=enter, name="tcomm-rendezvous", daemon=True)
        thread.start()
        thread.join(timeout)
        if done:
            return done[0], ""
        return None, problems[0] if problems else f"torch's rendezvous did not end within {timeout:g} s"

    def _refuse(self, offers: Sequence[_Offer], nbytes: int) -> None:
        if len({offer.nbytes for offer in offers}) > 1:
            told = ", ".join(f"rank {r}: {o.nbytes}" for r, o in enumerate(offers))
            raise GroupMismatchError(f"the ranks want buffers of different sizes ({told} bytes)")
        lacking = [f"rank {r}: {o.lacking}" for r, o in enumerate(offers) if o.lacking]
        if lacking:
            raise CapabilityError(
                f"no GPU memory of {nbytes} bytes a rank ({'; '.join(lacking)}); free some, or lower "
                "TCOMM_STAGING_BYTES"
            )

    def _sharing(self, offers: Sequence[_Offer]) -> str:
        """Which ranks are on one device though that is not allowed; empty where none are."""
        ranks_of: dict[str, list[int]] = {}
        for rank, offer in enumerate(offers):
            if offer.device:
                ranks_of.setdefault(offer.device, []).append(rank)
        told = [f"ranks {ranks} use one device" for ranks in ranks_of.values() if len(ranks) > 1]
        if not told or self._allow_shared_device:
            return ""
        return "; ".join(told) + ": give each its own, or set TCOMM_ALLOW_SHARED_DEVICE=1"

    def _gather(self, offer: _Offer, timeout: float, check: Callable[[], None] | None) -> list[_Offer]:
        payloads = self._exchange.all_gather(msgspec.msgpack.encode(offer), timeout, check)
        return [msgspec.msgpack.decode(payload, type=_Offer) for payload in payloads]
