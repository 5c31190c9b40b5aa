"""Symmetric memory of NVSHMEM, by nvshmem4py: between GPUs of one node and of several.

Everything here is collective and explicit. Nothing is freed by the garbage collector: freeing is collective,
and a rank that frees while another does not hangs both.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch

from tcomm.errors import CapabilityError, GroupClosedError, RendezvousError
from tcomm.memory.base import Exchange
from tcomm.memory.nvshmem_bitcode import Bitcode, find_bitcode
from tcomm.memory.nvshmem_buffer import NvshmemBuffer

__all__ = ["Nvshmem4py", "NvshmemTransport", "load_nvshmem"]

logger = logging.getLogger("tcomm")

_OTHERS_SECONDS = 5.0
"""How long `release` waits for the others."""
_RUNNING = ("STATUS_IS_INITIALIZED", "STATUS_LIMITED_MPG", "STATUS_FULL_MPG")


class Nvshmem4py:
    """All that is used of nvshmem4py and of CUDA, for one device.

    Args:
        core: `nvshmem.core`.
        bindings: `nvshmem.bindings`: memory goes through it, since `nvshmem.core` tracks references and frees
            on its own, and knows nothing of an NVSHMEM that somebody else started.
        device: what `nvshmem.core.init` takes.
        tensor_at: [n] uint8 over n bytes at an address.
        synchronize: waits until the device is idle.
        capability: of the device, 10 * major + minor.
    """

    def __init__(
        self,
        core: Any,
        bindings: Any,
        device: Any,
        tensor_at: Callable[[int, int], torch.Tensor],
        synchronize: Callable[[], None],
        capability: int,
    ) -> None:
        self.core = core
        self.bindings = bindings
        self.device = device
        self.tensor_at = tensor_at
        self.synchronize = synchronize
        self.capability = capability

    @property
    def is_running(self) -> bool:
        """Whether somebody has started NVSHMEM in this process."""
        status = self.core.InitStatus(self.core.init_status())
        return status.name in _RUNNING

    @property
    def host_version(self) -> str:
        """Of the host library that is loaded."""
        return str(self.core.get_version().libnvshmem_version)

    def new_unique_id(self) -> bytes:
        """What all ranks start with."""
        return bytes(self.core.get_unique_id(empty=False)._data.tobytes())

    def start(self, unique_id: bytes, rank: int, world_size: int) -> None:
        """Start NVSHMEM. **Collective.**"""
        uid = self.core.get_unique_id(empty=True)
        uid._data.view("u1")[:] = list(unique_id)
        self.core.init(device=self.device, uid=uid, rank=rank, nranks=world_size, initializer_method="uid")


class _CudaMemory:
    """Memory of a GPU as torch takes it over without a copy."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 3,
        }  # fmt: skip


def load_nvshmem(device: int) -> Nvshmem4py:
    """Import nvshmem4py for a CUDA device, and make that the current one.

    Raises:
        CapabilityError: when it is not there, or cannot be loaded.
    """
    try:
        core = importlib.import_module("nvshmem.core")
        bindings = importlib.import_module("nvshmem.bindings")
        cuda = importlib.import_module("cuda.core")
    except (ImportError, OSError, RuntimeError) as error:
        raise CapabilityError(
            f"nvshmem4py cannot be used ({type(error).__name__}: {error}); run `pip install tcomm[nvshmem]`"
        ) from error
    chosen = cuda.Device(device)
    chosen.set_current()
    major, minor = torch.cuda.get_device_capability(device)
    return Nvshmem4py(
        core,
        bindings,
        chosen,
        lambda address, nbytes: torch.as_tensor(_CudaMemory(address, nbytes), device=f"cuda:{device}"),
        lambda: torch.cuda.synchronize(device),
        10 * major + minor,
    )


class _Hello(msgspec.Struct, frozen=True):
    """What a rank tells the others before it starts."""

    problem: str = ""
    running: bool = False
    version: str = ""


class _Place(msgspec.Struct, frozen=True):
    """What a rank tells the others while it starts."""

    problem: str = ""
    unique_id: bytes = b""
    pe: int = -1
    count: int = 0


@dataclasses.dataclass
class _Use:
    """The NVSHMEM of this process, which several groups may use one beside the other."""

    transports: int = 0
    """That are open."""
    owned: bool = False
    """Whether one of them started it."""
    at_end: list[Callable[[], None]] = dataclasses.field(default_factory=list)
    """What is called before it ends."""


_use = _Use()


class NvshmemTransport:
    """Symmetric buffers over NVSHMEM, for a group that is all of its PEs.

    Made by `start`; used by one thread. After `close` everything it made is gone, on all ranks.

    Attributes:
        pes: NVSHMEM's number of each rank.
        owned: whether `start` started NVSHMEM; the last transport that is closed ends it then. Otherwise it
            was running, because of another group, of torch or of somebody else.
        library: what it uses of nvshmem4py.
        bitcode: what kernels link, of the library's version.
    """

    name = "NVSHMEM"

    def __init__(
        self,
        exchange: Exchange, library: Nvshmem4py, pes: Sequence[int], owned: bool, bitcode: Bitcode,
    ) -> None:  # fmt: skip
        self.library = library
        self.pes = tuple(pes)
        self.owned = owned
        self.bitcode = bitcode
        self._exchange = exchange
        self._buffers: list[NvshmemBuffer] = []
        self._kept: list[object] = []
        self._closed = False
        _use.transports += 1
        _use.owned |= owned

    @classmethod
    def start(
        cls,
        exchange: Exchange,
        device: int,
        timeout: float,
        *,
        load: Callable[[int], Nvshmem4py] = load_nvshmem,
        home: str = "",
        problem: str = "",
    ) -> NvshmemTransport:
        """Start NVSHMEM, or attach to the one that runs. **Collective.**

        Args:
            exchange: reaches the other ranks, by something other than NVSHMEM.
            device: index of the CUDA device of this rank.
            timeout: seconds for each exchange. Starting itself has no deadline: that is NVSHMEM's.
            load: gives what is used of nvshmem4py.
            home: directory to take the bitcode from; see `find_bitcode`.
            problem: what is in the way on this rank, besides; every rank is told.

        Raises:
            CapabilityError: on every rank, when one has no nvshmem4py, no bitcode or other versions, when it
                runs on some ranks only, or with other PEs than this group's.
            RendezvousError: when a rank did not come in time.
        """
        library, bitcode, hello = _prepare(load, device, home, problem)
        hellos = [
            msgspec.msgpack.decode(payload, type=_Hello)
            for payload in exchange.all_gather(msgspec.msgpack.encode(hello), timeout)
        ]
        _refuse_differences(hellos)
        if library is None or bitcode is None:
            raise AssertionError("a rank without a library has a problem")
        place = _Place()
        if not hello.running:
            place = _attempt(library.new_unique_id) if exchange.rank == 0 else place
            unique_id = _agreed(exchange, place, timeout)[0].unique_id
            place = _attempt(library.start, unique_id, exchange.rank, exchange.world_size)
        if not place.problem:
            place = _Place(pe=int(library.core.my_pe()), count=int(library.core.n_pes()))
        places = _agreed(exchange, place, timeout)
        pes = [place.pe for place in places]
        counts = {place.count for place in places}
        if counts != {exchange.world_size} or len(set(pes)) != len(pes):
            raise CapabilityError(
                f"NVSHMEM runs with {sorted(counts)} PEs, and the {exchange.world_size} ranks of this group "
                f"are PEs {pes}; its memory is allocated by all PEs together, so make the group of all"
            )
        return cls(exchange, library, pes, not hello.running, bitcode)

    def allocate(self, nbytes: int, timeout: float, check: Callable[[], None] | None = None) -> NvshmemBuffer:
        """Make a zeroed buffer of `nbytes` on every rank, and map those within reach. **Collective.**

        `check` is called while this rank waits for others; what it raises ends the wait.

        Raises:
            CapabilityError: on every rank, when the ranks ask for different sizes, or there is no room.
            GroupClosedError: after `close`.
            RendezvousError: when a rank did not come in time.
        """
        self._refuse_closed()
        sizes = {int(size) for size in self._exchange.all_gather(str(nbytes).encode(), timeout, check)}
        if sizes != {nbytes}:
            raise CapabilityError(
                f"the ranks ask for {sorted(sizes)} bytes of NVSHMEM memory; give the same size on all"
            )
        library, rank = self.library, self._exchange.rank
        try:
            address = int(library.bindings.malloc(nbytes))
        except Exception as error:  # noqa: BLE001 - every rank is told
            logger.warning("NVSHMEM's malloc: %s", error)
            address = 0
        got = self._exchange.all_gather(str(address).encode(), timeout, check)
        lacking = [r for r, payload in enumerate(got) if payload == b"0"]
        if lacking:
            raise CapabilityError(
                f"no {nbytes} bytes in NVSHMEM's heap on ranks {lacking}; set NVSHMEM_SYMMETRIC_SIZE higher"
            )
        addresses = [
            address if peer == rank else int(library.bindings.ptr(address, pe))
            for peer, pe in enumerate(self.pes)
        ]
        views = [library.tensor_at(there, nbytes) if there else None for there in addresses]
        buffer = NvshmemBuffer(rank, address, views, addresses)
        buffer.local.zero_()
        library.synchronize()
        self._exchange.all_gather(b"zeroed", timeout, check)
        self._buffers.append(buffer)
        return buffer

    def settle(self) -> None:
        """Wait until the device has done all that it was given."""
        self.library.synchronize()

    def keep(self, thing: object) -> None:
        """Keep what kernels may use until the end."""
        self._kept.append(thing)

    def why_no_multicast(self) -> str:
        """Why its buffers have no multicast address."""
        return "memory of NVSHMEM is used without multicast"

    def on_close(self, function: Callable[[], None]) -> None:
        """Call `function` when the last transport closes, after memory was freed and while NVSHMEM runs."""
        self._refuse_closed()
        _use.at_end.append(function)

    def release(self) -> None:
        """`close`, which waits a little for the others; without them the memory is NVSHMEM's to the end."""
        try:
            self.close(_OTHERS_SECONDS)
        except RendezvousError as error:
            self._closed = True
            logger.warning(
                "memory of NVSHMEM stays until the process ends, freeing takes all ranks: %s", error
            )

    def close(self, timeout: float) -> None:
        """Free everything, the last first, and end NVSHMEM where tcomm started it. **Collective.**

        Never called by the garbage collector or at exit of itself: ranks that are not all here would hang.
        May be called again. NVSHMEM ends with the last transport of the process. Destroy the process group
        after it.

        Raises:
            RendezvousError: when a rank did not come in time; nothing was freed.
        """
        if self._closed:
            return
        self.library.synchronize()
        self._meet(b"close", timeout)
        # Again, since whoever came last has not seen that another gave up before.
        self._meet(b"free", timeout)
        self._closed = True
        for buffer in self._buffers:
            buffer.forget()
        for buffer in reversed(self._buffers):
            self.library.bindings.free(buffer.address)
        self._buffers.clear()
        self._kept.clear()
        _use.transports -= 1
        if _use.transports == 0:
            self._end()

    def _meet(self, step: bytes, timeout: float) -> None:
        if set(self._exchange.all_gather(step, timeout)) != {step}:
            raise RendezvousError("another rank has given up closing the group before")

    def _end(self) -> None:
        for function in _use.at_end:
            function()
        _use.at_end.clear()
        if _use.owned:
            self.library.core.finalize()
        _use.owned = False

    def _refuse_closed(self) -> None:
        if self._closed:
            raise GroupClosedError("the NVSHMEM transport is closed; start another")


def _prepare(
    load: Callable[[int], Nvshmem4py], device: int, home: str, problem: str
) -> tuple[Nvshmem4py | None, Bitcode | None, _Hello]:
    """The library of this rank, what kernels link, and what it tells the others."""
    if problem:
        return None, None, _Hello(problem=problem)
    try:
        library = load(device)
        version = library.host_version
        bitcode = find_bitcode(library.capability, home)
    except CapabilityError as error:
        return None, None, _Hello(problem=str(error))
    except Exception as error:  # noqa: BLE001 - a rank that raised alone would leave the others waiting
        return None, None, _Hello(problem=f"{type(error).__name__}: {error}")
    if bitcode.version != version:
        problem = (
            f"the host library of NVSHMEM is {version} and the bitcode {bitcode.path} is {bitcode.version}, "
            "which would corrupt memory; install one version, or name its directory in TCOMM_NVSHMEM_HOME"
        )
        return None, None, _Hello(problem=problem)
    return library, bitcode, _Hello(running=library.is_running, version=version)


def _attempt(function: Callable[..., bytes | None], *args: Any) -> _Place:
    """Call a function of NVSHMEM; what it gives, or its error, is for all ranks."""
    try:
        return _Place(unique_id=function(*args) or b"")
    except Exception as error:  # noqa: BLE001 - a rank that raised alone would leave the others waiting
        return _Place(problem=f"{type(error).__name__}: {error}")


def _agreed(exchange: Exchange, place: _Place, timeout: float) -> list[_Place]:
    """What all ranks tell, when none has a problem."""
    payloads = exchange.all_gather(msgspec.msgpack.encode(place), timeout)
    places = [msgspec.msgpack.decode(payload, type=_Place) for payload in payloads]
    if problems := [f"rank {rank}: {p.problem}" for rank, p in enumerate(places) if p.problem]:
        raise CapabilityError(
            f"NVSHMEM did not start; {'; '.join(problems)}; look at NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME, or "
            "run with NVSHMEM_DEBUG=INFO"
        )
    return places


def _refuse_differences(hellos: Sequence[_Hello]) -> None:
    """Raise on every rank alike."""
    problems = [f"rank {rank}: {hello.problem}" for rank, hello in enumerate(hellos) if hello.problem]
    if problems:
        raise CapabilityError("NVSHMEM cannot be used; " + "; ".join(problems))
    versions = {hello.version for hello in hellos}
    if len(versions) > 1:
        told = ", ".join(f"rank {rank} has {hello.version}" for rank, hello in enumerate(hellos))
        raise CapabilityError(f"the ranks have different versions of NVSHMEM ({told}); install one")
    running = [rank for rank, hello in enumerate(hellos) if hello.running]
    if running and len(running) < len(hellos):
        raise CapabilityError(
            f"NVSHMEM runs on ranks {running} and not on the others; start it on all ranks before, or on none"
        )
