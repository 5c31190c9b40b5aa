"""The symmetric memory of one exchange of tokens: an arena, an order of calls and an account of its own."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import TypeVar

import msgspec
import torch

from tcomm.errors import CapabilityError, ConfigError, DecodeError
from tcomm.groups.arguments import UNSET, Timeout, Unset
from tcomm.groups.differences import refuse_differences
from tcomm.groups.handle import SETUP_SECONDS, GroupHandle
from tcomm.groups.setup import Membership
from tcomm.interpret import why_not_runnable
from tcomm.memory.arena import Arena, open_arena
from tcomm.memory.base import Exchange, KernelArena, NotShared
from tcomm.memory.channel import Channel
from tcomm.memory.layout import StagingLayout
from tcomm.signature import CallDescription

__all__ = ["Hook", "Traffic", "Workspace"]

_T = TypeVar("_T")
_SHARE_OF_FREE_MEMORY = 2


@dataclasses.dataclass
class Traffic:
    """What a rank has moved, counted on the host; where kernels alone know the counts, only the calls are."""

    wire_nbytes: int = 0
    """Bytes moved between this rank and others on its behalf: none for what stays at home."""
    num_phases: int = 0
    """Times that the ranks waited for one another."""


class Hook:
    """The second half of a call. Calling it again does nothing."""

    def __init__(self, workspace: Workspace, receive: Callable[[], None]) -> None:
        self._workspace = workspace
        self._receive: Callable[[], None] | None = receive

    @property
    def is_done(self) -> bool:
        """Whether the call is complete, or was broken off."""
        return self._receive is None

    def __call__(self) -> None:
        """Wait for the peers and take what they gave. **Collective.**

        Raises:
            CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
        """
        receive, self._receive = self._receive, None
        if receive is not None:
            self._workspace.run(receive)


class _Verdict(msgspec.Struct, frozen=True):
    """What a rank says of the memory that it would have to give, and of what it is to be the same."""

    refusal: str
    same: dict[str, str]


class Workspace(GroupHandle):
    """Symmetric memory and an order of calls for one exchange of tokens. **Collective** to create.

    A call is one epoch: ranks write into the half of its parity, publish, wait, and read. It may be left
    open after publishing; the next call completes it first, since a rank that publishes an epoch says
    that it has read all of the epochs before.

    Args:
        members: who takes part.
        half_nbytes: of one parity, for each rank; the same on every rank.
        timeout: of waits: seconds, a profile, or None: as long as the peers live.
        device: of the tokens.
        engine: `cpu` for vectorised code on the host, `triton` for kernels; empty: what suits the device.

    Raises:
        ConfigError: when an argument is wrong.
        CapabilityError: on every rank, when they share no memory, or the buffers would pass half of what is
            free on one of them; says needed and free bytes.
        GroupMismatchError: on every rank, when they give different sizes, devices or engines.
        RendezvousError: as `Communicator` does.
    """

    def __init__(
        self,
        members: Membership,
        half_nbytes: int,
        *,
        timeout: Timeout | Unset = UNSET,
        device: torch.device | str = "cpu",
        engine: str = "",
    ) -> None:
        self.device = _device_of(device)
        self.engine = _engine_of(self.device, engine)
        self.traffic = Traffic()
        self._pending: Hook | None = None
        self._start(members, timeout)
        nbytes = StagingLayout.for_half(half_nbytes, self.world_size)
        try:
            self._agree_on_memory(nbytes)
            self.arena = self._make_memory(nbytes)
        except BaseException as error:
            self._close(f"{type(error).__name__}: {error}")
            raise

    def _open_arena(self, exchange: Exchange, num_cores: int) -> tuple[Arena | None, str]:
        if self.world_size > 1:
            return super()._open_arena(exchange, num_cores)
        made = open_arena(self.name, exchange, self.config.shm_dir, self.config.spins or 1, SETUP_SECONDS)
        return (None, made.reason) if isinstance(made, NotShared) else (made, "")

    def _agree_on_memory(self, nbytes: int) -> None:
        """Refuse buffers that leave too little to others, or that differ, on all ranks if on one."""
        on_host = self.device.type == "cpu"
        needed = nbytes * self.world_size if on_host else nbytes
        free = _free_on_host(self.config.shm_dir) if on_host else torch.cuda.mem_get_info(self.device)[0]
        refusal = ""
        if needed > free // _SHARE_OF_FREE_MEMORY:
            whose = f"{self.world_size} ranks on this host" if on_host else "this rank"
            refusal = (
                f"rank {self.rank}: buffers of {nbytes} bytes a rank need {needed} bytes for {whose}, more "
                f"than half of the {free} bytes that are free"
            )
        same = {"bytes a rank": str(nbytes), "device": self.device.type, "engine": self.engine}
        verdict = msgspec.msgpack.encode(_Verdict(refusal, same))
        told = self._members.exchange.all_gather(verdict, SETUP_SECONDS)
        verdicts = [msgspec.msgpack.decode(data, type=_Verdict) for data in told]
        refuse_differences(self.name, [verdict.same for verdict in verdicts])
        if refusals := [verdict.refusal for verdict in verdicts if verdict.refusal]:
            raise CapabilityError("; ".join(refusals) + "; give fewer tokens a rank, or smaller buffers")

    def _make_memory(self, nbytes: int) -> KernelArena:
        if self._arena is None:
            raise CapabilityError(
                f"group {self.name!r} has no symmetric memory: {self.capabilities.no_shared_memory}; without "
                "it tokens go by AgRsAll2AllManager, and weights of experts by an EplbCommunicator"
            )
        with torch.inference_mode(False):
            if self.device.type == "cpu":
                self._arena.grow(nbytes, SETUP_SECONDS)
                return self._arena
            self._open_device(self.device, CallDescription("workspace", shape=(nbytes,)), self.timeout)
            if self._devices.arena is None:
                raise CapabilityError(f"group {self.name!r} has no symmetric memory on {self.device}")
            self._devices.arena.grow(nbytes, SETUP_SECONDS)
            return self._devices.arena

    @property
    def half_nbytes(self) -> int:
        """Bytes of one parity."""
        assert self.arena.staging is not None
        return self.arena.staging.layout.half_bytes

    def view(
        self, rank: int, epoch: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """A tensor over the half of an epoch, in any rank's memory.

        Args:
            rank: whose memory.
            epoch: its parity counts.
            offset: bytes from the beginning of the half, a multiple of 16.
            shape: of the tensor.
            dtype: of the tensor.

        Raises:
            IndexError: when it would pass the end.
        """
        staging = self.arena.staging
        assert staging is not None
        return staging.buffer.peer(rank, shape, dtype, staging.layout.half(epoch & 1) + offset)

    def run(self, body: Callable[[], _T]) -> _T:
        """Run the body of a call: one at a time, and the last one if it breaks off in the middle.

        Raises:
            GroupClosedError: when the workspace is closed, or belongs to another process.
            DecodeError: when a peer's memory is not what it published; the group is given up.
        """

        def body_or_end() -> _T:
            try:
                return body()
            except DecodeError:
                # The others do not know of it, and would wait for this rank in the next call.
                self._channel.interrupt()
                raise

        result: _T = self._call(body_or_end)
        return result

    def seconds(self, timeout: Timeout | Unset = UNSET) -> float | None:
        """What `timeout` means, in seconds."""
        return self._seconds(timeout)

    def begin(self, call: CallDescription, timeout: float | None) -> int:
        """Complete what was left open, and take the next epoch on the host. Inside of `run`."""
        self.drain()
        return self._channel.begin(call, timeout)

    def publish(self, epoch: int, call: CallDescription) -> None:
        """Tell all peers that this rank has written what it gives in that epoch."""
        self._channel.publish(0, epoch << 32 | call.signature)

    def await_peers(self, epoch: int, call: CallDescription) -> None:
        """Wait until all peers have published that epoch.

        Raises:
            CollectiveMismatchError, PeerLostError, PeerTimeoutError: see `Channel.await_peers`.
        """
        self.traffic.num_phases += 1
        self._channel.await_peers(0, epoch << 32 | call.signature)

    def finish(self, epoch: int) -> None:
        """End the epoch: what peers wrote for it has been read."""
        self._channel.finish(epoch)

    @property
    def host_arena(self) -> Arena:
        """Control pages in host memory, by which the hosts agree also where kernels work on GPUs."""
        assert self._arena is not None
        return self._arena

    @property
    def _channel(self) -> Channel:
        return self.host_arena.channel

    def defer(self, receive: Callable[[], None]) -> Hook:
        """Leave a call open after it has published; `receive` is run by the hook, or by the next call."""
        self._pending = Hook(self, receive)
        return self._pending

    @property
    def is_open(self) -> bool:
        """Whether a call was left open, and is not complete yet."""
        return self._pending is not None and not self._pending.is_done

    def drain(self) -> None:
        """Complete a call that was left open. **Collective** if one was.

        Raises:
            CollectiveMismatchError, PeerLostError, PeerTimeoutError: from its wait.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending()


def _device_of(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device={device!r} is none that torch knows; give 'cpu' or 'cuda'") from None


def _engine_of(device: torch.device, engine: str) -> str:
    if device.type not in {"cpu", "cuda"}:
        raise ConfigError(f"device={str(device)!r}: tokens are exchanged on 'cpu' or 'cuda'")
    chosen = engine or ("cpu" if device.type == "cpu" else "triton")
    if chosen not in {"cpu", "triton"} or (chosen == "cpu" and device.type != "cpu"):
        raise ConfigError(f"engine={engine!r} for tokens on {device}; give 'triton', or 'cpu' on a CPU")
    if chosen == "triton" and device.type == "cpu" and (reason := why_not_runnable()):
        raise CapabilityError(f"engine='triton' on a CPU: {reason}")
    return chosen


def _free_on_host(directory: str) -> int:
    """Bytes of host memory that shared memory in `directory` can still take."""
    stat = os.statvfs(directory)
    available = stat.f_bavail * stat.f_frsize
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return min(available, int(line.split()[1]) * 1024)
    return available
