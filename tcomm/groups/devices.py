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
from tcomm.groups.setup import Membership, split_exchange
from tcomm.interpret import is_interpreted
from tcomm.memory.base import NotShared
from tcomm.memory.channel import Channel
from tcomm.memory.control import MAX_WORLD_SIZE
from tcomm.memory.cuda import CudaTransport, TorchSymmetricMemory
from tcomm.memory.device_arena import DeviceArena, DeviceTransport, open_device_arena
from tcomm.memory.exchange import StoreExchange
from tcomm.memory.nvshmem import NvshmemTransport
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
    identify_host: Callable[[], str] = host_identity
    start_nvshmem: Callable[[torch.device, Membership, Config, float], NvshmemTransport] | None = None


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


def _start_nvshmem(
    device: torch.device, members: Membership, config: Config, seconds: float
) -> NvshmemTransport:
    from tcomm.kernels.nvshmem_modules import why_not_linked

    # Of its own: whoever closes must meet nobody who does something else.
    exchange = split_exchange(members, "nvshmem")
    problem = "" if importlib.util.find_spec("triton") is None else why_not_linked()
    return NvshmemTransport.start(exchange, device.index, seconds, home=config.nvshmem_home, problem=problem)


REAL_DEVICES = Devices(_make_transport, describe_device, _refuse_in_capture, host_identity, _start_nvshmem)


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
            if self.topology is not None and self.topology.num_nodes > 1 == self.topology.ranks_per_node:
                # Slots of all nodes, in the accumulator's type, lie beside a message that nobody divides.
                nbytes *= 3
            staging = self.arena.staging
            if staging is None or staging.layout.nbytes < nbytes:
                self.arena.grow(nbytes, self._seconds)
            if self.topology is not None and self.topology.num_nodes > 1:
                self._compile_on_nodes(self.arena, self.topology, dtypes, ops)
            else:
                compile_ahead(self.arena, dtypes, ops)

    def _compile_on_nodes(
        self, arena: DeviceArena, topology: Topology, dtypes: Sequence[torch.dtype], ops: Sequence[str]
    ) -> None:
        from tcomm.kernels.hierarchical import compile_nodes_ahead

        can = topology.ranks_per_node and topology.ranks_are_in_order and not topology.no_kernels
        if can and arena.nvshmem is not None:
            compile_nodes_ahead(arena, topology.num_nodes, arena.nvshmem.pes, dtypes, ops)

    def close(self, reason: str) -> None:
        """Give the memory back. May be called twice."""
        # A process that ends while somebody holds a process group is aborted by torch.
        self._members = dataclasses.replace(self._members, process_group=None)
        if self.arena is not None:
            self.arena.close(reason)

    def _make(self, device: torch.device) -> Topology:
        exchange = self._members.exchange
        mine = self.devices.identify_host()
        hosts = [host.decode() for host in exchange.all_gather(mine.encode(), self._seconds)]
        transport, no_nvshmem = self._open_transport(device, hosts)
        made: DeviceArena | NotShared = NotShared(f"the ranks are on several hosts, and {no_nvshmem}")
        if transport is not None:
            made = open_device_arena(
                self._members.name, exchange, transport, device, self._host, self._config.staging_bytes,
                self._seconds, self._prove,
            )  # fmt: skip
        if isinstance(made, NotShared) or transport is None:
            reason = made.reason if isinstance(made, NotShared) else ""
            logger.warning("group %r has no memory on GPUs: %s", self._members.name, reason)
            apart = {rank: "it is on another host" for rank, host in enumerate(hosts) if host != mine}
            report = self.devices.describe(device, reason, apart)
            report = msgspec.structs.replace(report, no_symmetric_memory=reason)
        else:
            self.arena = made
            no_multicast = "" if made.multicast else transport.why_no_multicast()
            report = self.devices.describe(device, no_multicast, made.unreachable)
        report = msgspec.structs.replace(
            report, host=mine, no_kernels=_why_no_kernels(device), no_nvshmem=no_nvshmem
        )
        reports = exchange.all_gather(msgspec.msgpack.encode(report), self._seconds)
        return vote([msgspec.msgpack.decode(data, type=DeviceReport) for data in reports])

    def _open_transport(
        self, device: torch.device, hosts: Sequence[str]
    ) -> tuple[DeviceTransport | None, str]:
        """What makes the memory, and why that is not NVSHMEM. None where nothing reaches all hosts."""
        if len(set(hosts)) == 1:
            made = self.devices.make_transport(device, self._members, self._config)
            return made, "the memory of the group is torch's and not NVSHMEM's"
        if len(hosts) > MAX_WORLD_SIZE:
            return (
                None,
                f"{len(hosts)} ranks are more than the {MAX_WORLD_SIZE} that a control page has room for",
            )
        try:
            if self.devices.start_nvshmem is None:
                raise CapabilityError("NVSHMEM cannot be started")
            return self.devices.start_nvshmem(device, self._members, self._config, self._seconds), ""
        except CapabilityError as error:
            # The same on every rank: `start` raises what all have told.
            return None, str(error)

    def _prove(self, arena: DeviceArena) -> None:
        arena.prove_access(prove_access, self._seconds)


def _why_no_kernels(device: torch.device) -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda" and is_interpreted():
        return "TRITON_INTERPRET is set, and interpreted kernels cannot use its memory"
    return ""
