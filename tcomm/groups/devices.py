"""A group's memory on its GPUs: made at its first collective there, or by `prepare`."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import NoReturn

import msgspec
import torch

from tcomm.config import Config
from tcomm.errors import CapabilityError, ConfigError
from tcomm.groups.agreement import Agreement
from tcomm.groups.setup import Membership
from tcomm.interpret import is_interpreted
from tcomm.memory.base import NotShared
from tcomm.memory.channel import Channel
from tcomm.memory.cuda import CudaTransport, TorchSymmetricMemory
from tcomm.memory.device_arena import DeviceArena, open_device_arena
from tcomm.memory.exchange import StoreExchange
from tcomm.memory.probe import describe_device, host_identity, prove_access
from tcomm.memory.runtime import CudaRuntime
from tcomm.signature import CallDescription
from tcomm.topology import DeviceReport, Topology, vote

__all__ = ["DeviceMemory"]

logger = logging.getLogger("tcomm")


@dataclasses.dataclass(frozen=True)
class Devices:
    """What is done with GPUs. A test puts its own in."""

    make_transport: Callable[[torch.device, Membership, Config], CudaTransport]
    describe: Callable[[torch.device, str, dict[int, str]], DeviceReport]
    refuse_in_capture: Callable[[torch.device, str], None]


def _make_transport(device: torch.device, members: Membership, config: Config) -> CudaTransport:
    exchange = members.exchange
    if not isinstance(exchange, StoreExchange):
        raise CapabilityError(f"group {members.name!r} has no store, by which torch maps memory between GPUs")
    memory = TorchSymmetricMemory(
        device, exchange.store, exchange.prefix, host_identity(), members.process_group
    )
    return CudaTransport(exchange, memory, config.allow_shared_device)


def _refuse_in_capture(device: torch.device, what: str) -> None:
    CudaRuntime(device).refuse_in_capture(what)


REAL_DEVICES = Devices(_make_transport, describe_device, _refuse_in_capture)


class DeviceMemory:
    """The GPUs of a group, as one rank sees them.

    Args:
        members: of the group.
        config: of this process.
        host: the group's channel on this machine; None where the ranks share no host memory.
        setup_seconds: for each step of setting up.

    Attributes:
        arena: None until it is made, and where it cannot be.
        topology: what the ranks voted; None until then.
    """

    devices = REAL_DEVICES

    def __init__(
        self, members: Membership, config: Config, host: Channel | None, setup_seconds: float
    ) -> None:
        self.arena: DeviceArena | None = None
        self.topology: Topology | None = None
        self._members = members
        self._config = config
        self._host = host
        self._seconds = setup_seconds

    def open(
        self, device: torch.device, call: CallDescription, agreement: Agreement, timeout: float | None
    ) -> Topology:
        """Make the memory and vote on the GPUs, unless that was done before. **Collective.**

        Args:
            device: of this rank.
            call: the collective that needs it, which the ranks agree on before anything is made.
            agreement: of the group.
            timeout: for agreeing, in seconds.

        Raises:
            CapabilityError: while a graph is captured; on every rank, when one lacks the room.
            CollectiveMismatchError: on every rank, when they call different things.
            PeerLostError, PeerTimeoutError, RendezvousError: when a rank did not come.
        """
        if self.topology is None:
            self.devices.refuse_in_capture(device, "the memory of the group on GPUs has to be made")
            agreement.agree(msgspec.structs.replace(call, algorithm="first on GPUs"), timeout)
            self.topology = self._make(device)
        return self.topology

    def refuse_device(self, device: torch.device) -> NoReturn:
        """Raise for a tensor on another device than this rank's first one.

        Raises:
            ConfigError: always.
        """
        mine = None if self.arena is None else self.arena.device
        raise ConfigError(
            f"a tensor on {device}: this rank's memory in group {self._members.name!r} is on {mine}; keep to "
            "one device, or make a group for the other"
        )

    def prepare(self, nbytes: int, dtypes: Sequence[torch.dtype], ops: Sequence[str]) -> None:
        """Make room for a message, and compile. **Collective**, after `open`.

        Raises:
            CapabilityError: while a graph is captured; on every rank, when one lacks the room.
        """
        from tcomm.kernels.warmup import compile_ahead

        if self.arena is not None:
            staging = self.arena.staging
            if staging is None or staging.layout.nbytes < nbytes:
                self.arena.grow(nbytes, self._seconds)
            compile_ahead(self.arena, dtypes, ops)

    def close(self, reason: str) -> None:
        """Give the memory back. May be called twice."""
        if self.arena is not None:
            self.arena.close(reason)

    def _make(self, device: torch.device) -> Topology:
        exchange = self._members.exchange
        transport = self.devices.make_transport(device, self._members, self._config)
        made = open_device_arena(
            self._members.name, exchange, transport, device, self._host, self._config.staging_bytes,
            self._seconds, self._prove,
        )  # fmt: skip
        if isinstance(made, NotShared):
            logger.warning("group %r has no memory on GPUs: %s", self._members.name, made.reason)
            report = self.devices.describe(device, made.reason, {})
            report = msgspec.structs.replace(report, no_symmetric_memory=made.reason)
        else:
            self.arena = made
            no_multicast = "" if made.multicast else self._why_no_multicast(transport)
            report = self.devices.describe(device, no_multicast, made.unreachable)
        report = msgspec.structs.replace(
            report,
            no_kernels=_why_no_kernels(device),
            no_nvshmem="the memory of the group is torch's and not NVSHMEM's",
        )
        reports = exchange.all_gather(msgspec.msgpack.encode(report), self._seconds)
        return vote([msgspec.msgpack.decode(data, type=DeviceReport) for data in reports])

    def _prove(self, arena: DeviceArena) -> None:
        arena.prove_access(prove_access, self._seconds)

    def _why_no_multicast(self, transport: CudaTransport) -> str:
        if self._config.allow_shared_device:
            return "TCOMM_ALLOW_SHARED_DEVICE gives multicast up"
        return transport.memory.why_no_multicast() or "torch gave the memory no multicast address"


def _why_no_kernels(device: torch.device) -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda" and is_interpreted():
        return "TRITON_INTERPRET is set, and interpreted kernels cannot use its memory"
    return ""
