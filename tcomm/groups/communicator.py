"""The communicator: one group's collectives, each by the algorithm that the group agreed on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Self

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tcomm.groups.aliases import Aliases
from tcomm.groups.arguments import UNSET, Timeout, Unset, check_new, check_prepared, dtype_name
from tcomm.groups.coalescing import Coalescing
from tcomm.groups.handle import SETUP_SECONDS
from tcomm.groups.point_to_point import PointToPoint
from tcomm.groups.setup import from_process_group, from_store, split_membership
from tcomm.memory.exchange import Store
from tcomm.memory.layout import StagingLayout
from tcomm.signature import CallDescription

__all__ = ["Communicator"]

logger = logging.getLogger("tcomm")


class Communicator(Aliases, PointToPoint):
    """Collectives of one group of ranks. **Collective** to create.

    One order of calls: every rank makes the same calls in the same order. Calls from several threads of a
    rank are serialised in the order in which they get the lock. After a fork, only the parent may use it.

    Args:
        group: a process group, a one-dimensional DeviceMesh such as `mesh["tp"]`, or None for the default
            group, or for this process alone where there is none.
        name: for errors and logs; the same on every rank.
        timeout: for calls that give none: seconds, a profile (`default` 120 s, `ml_inference` 600 s,
            `streaming` 1800 s, `batch_job` as long as the peers live) or None, which is `batch_job`.

    Raises:
        ConfigError: when an argument or a TCOMM_ variable is wrong.
        CapabilityError: when there is too little shared memory; says needed and available.
        RendezvousError: when a rank did not come; names it. GroupMismatchError: when settings differ.
    """

    _has_logged_ordinary = False

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        *,
        name: str = "",
        timeout: Timeout | Unset = UNSET,
    ) -> None:
        self._start(from_process_group(group, name), timeout)

    @classmethod
    def from_store(
        cls,
        store: Store,
        rank: int,
        world_size: int,
        *,
        name: str = "group",
        timeout: Timeout | Unset = UNSET,
    ) -> Self:
        """A communicator without a process group, and so with nothing to fall back to. **Collective.**

        Raises:
            ConfigError, CapabilityError, RendezvousError: as the constructor does.
        """
        communicator = cls.__new__(cls)
        communicator._start(from_store(store, rank, world_size, name), timeout)
        return communicator

    def coalescing(self) -> Coalescing:
        """Several collectives on small tensors in one call: see `Coalescing`. Collective when it ends."""
        return Coalescing(self)

    def split(self, name: str = "", *, timeout: Timeout | Unset = UNSET) -> Communicator:
        """Another communicator of the same ranks, with its own memory and order of calls. **Collective.**

        For calls that overlap with those of this one: on another stream, in another thread, or in a graph
        that is replayed at the same time.

        Args:
            name: for errors and logs, behind the name of this one; the same on every rank.
            timeout: for calls that give none; None given here is as for the constructor.

        Raises:
            CollectiveMismatchError: when ranks give different names.
            ConfigError, CapabilityError, RendezvousError: as the constructor does.
        """
        name = name or f"split{self._splits}"
        call = CallDescription("split", contents=name)
        seconds = self._seconds(timeout)

        def run() -> Communicator:
            self._agreement.agree(call, seconds)
            self._splits += 1
            other = Communicator.__new__(Communicator)
            other._start(split_membership(self._members, name), timeout)
            return other

        other = self._in_order(run, False)
        assert isinstance(other, Communicator)
        return other

    def symmetric_empty(
        self,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        *,
        timeout: Timeout | Unset = UNSET,
    ) -> torch.Tensor:
        """A tensor on the CPU that all ranks of the group can write to. **Collective.**

        `all_reduce(x, out=t)` of long messages then stages nothing: peers write their part of the result
        straight to `t`, or to an aligned contiguous part of it, the same on every rank; with it as x, too,
        nothing is copied at all. Each such part has a plan of its own, which the first call on it makes: a
        few parts used often are fast, and ever new ones slower than ordinary results. Otherwise it is a
        tensor like any other. Its memory stays until the group is closed, or later where a tensor over it
        is kept; a call that ends in an error leaves arbitrary values, which a peer that is merely late may
        still change.

        Where the ranks share no memory it is an ordinary tensor, and the reason is logged.

        Args:
            shape: the same on every rank.
            dtype: element type, likewise.
            timeout: as of every collective, for the ranks to meet.

        Raises:
            ConfigError: when an argument is wrong.
            CollectiveMismatchError: when ranks ask for different tensors.
            CapabilityError: on every rank, when there is too little shared memory.
        """
        size = check_new(shape, dtype)
        call = CallDescription("symmetric_empty", dtype_name(dtype), tuple(size))
        seconds = self._seconds(timeout)

        def run() -> torch.Tensor:
            self._agreement.agree(call, seconds)
            with torch.inference_mode(False):
                if self._arena is None or not size.numel():
                    self._log_ordinary()
                    return torch.zeros(size, dtype=dtype, device="cpu")
                made = self._arena.add_region(size.numel() * dtype.itemsize, SETUP_SECONDS)
                return made.local.view(dtype).view(size)

        made = self._in_order(run, False)
        assert isinstance(made, torch.Tensor)
        return made

    def _log_ordinary(self) -> None:
        reason = self.capabilities.no_shared_memory
        if self.world_size > 1 and reason and not self._has_logged_ordinary:
            self._has_logged_ordinary = True
            logger.info("group %r: symmetric tensors are ordinary ones: %s", self.name, reason)

    def prepare(
        self,
        max_nbytes: int,
        dtypes: Sequence[torch.dtype] = (),
        ops: Sequence[str] = ("sum",),
        *,
        timeout: Timeout | Unset = UNSET,
    ) -> None:
        """Do ahead what must not happen while a graph is captured or a peer waits. **Collective.**

        Makes staging in which a message of `max_nbytes` goes in one piece, never smaller than
        TCOMM_STAGING_BYTES; on GPUs compiles and loads the kernels for `dtypes`. Ends when every rank has.
        Memory that somebody still holds stays as it is; addresses never change under anybody's hands.

        Args:
            max_nbytes: of a message.
            dtypes: of tensors on GPUs.
            ops: reduce operations, likewise.
            timeout: as of every collective.

        Raises:
            ConfigError: when an argument is wrong.
            CapabilityError: on every rank, when there is too little memory; the old staging stays.
        """
        kinds = check_prepared(max_nbytes, dtypes, ops)
        call = CallDescription("prepare", shape=(max_nbytes,), contents=" ".join(kinds))
        seconds = self._seconds(timeout)
        nbytes = max(StagingLayout.for_message(max_nbytes, self.world_size), self.config.staging_bytes)

        device = torch.device("cuda", torch.cuda.current_device()) if dtypes and _has_gpu() else None
        if device is not None:
            call = msgspec.structs.replace(call, contents=f"{call.contents} on cuda")

        def run() -> torch.Tensor:
            if device is not None:
                self._open_device(device, call, seconds)
            self._agreement.agree(call, seconds)
            with torch.inference_mode(False):
                if self._arena is not None:
                    self._arena.grow(nbytes, SETUP_SECONDS)
                if self._devices.topology is not None:
                    self._devices.prepare(nbytes, dtypes, ops)
                    # Nobody calls before the last rank has compiled.
                    self._agreement.agree(call, seconds)
            self._forget_plans()
            return torch.empty(0, device="cpu")

        self._in_order(run, False)


def _has_gpu() -> bool:
    return torch.cuda.is_available()
