"""The manager of an expert group's exchange: made with the group, chosen where it is to be chosen."""

from __future__ import annotations

import contextlib
import shutil
from typing import cast

import msgspec
import torch
import torch.distributed as dist

from tcomm.config import Config, EngineConfig
from tcomm.errors import UsageError
from tcomm.groups.all2all.base import All2AllManagerBase
from tcomm.groups.all2all.choice import AUTO, Choice, Exchanged, choose_backend
from tcomm.groups.all2all.making import make_manager
from tcomm.groups.all2all.surroundings import Coordinator, among
from tcomm.groups.communicator import Communicator
from tcomm.groups.device.experts import ExpertTraffic
from tcomm.groups.handle import SETUP_SECONDS
from tcomm.groups.stateless.same_node import gather_bytes

__all__ = ["ManagedTraffic"]

_DEFAULT = "allgather_reducescatter"


class ManagedTraffic(ExpertTraffic):
    """Dispatch and combine by the manager of a backend; the rest of it is a device communicator's."""

    cpu_group: dist.ProcessGroup | None
    device: torch.device
    world_size: int
    rank_in_group: int
    use_all2all: bool
    all2all_backend: str | None
    communicator: Communicator
    _managers: dict[str, All2AllManagerBase]
    _free_nbytes: int | None

    def _backend_of(self, given: str | None) -> str | None:
        """The backend by name; None where no tokens are exchanged."""
        self._managers, self._free_nbytes = {}, None
        if not self.use_all2all:
            return None
        return given or EngineConfig.from_environment().all2all_backend or _DEFAULT

    def _open_traffic(self) -> None:
        """Make the manager; where one is chosen for each layer, that which takes all. **Collective.**"""
        if self.all2all_backend is None or self.world_size == 1:
            return
        backend = self.all2all_backend
        self.all2all_manager = self._manager(_DEFAULT if backend == AUTO else backend)

    def _manager(self, backend: str) -> All2AllManagerBase:
        found = self._managers.get(backend)
        if found is None:
            assert self.cpu_group is not None
            with among({"ep": cast("Coordinator", self)}):
                found = self._managers[backend] = make_manager(backend, self.cpu_group)
        return found

    def _free_here(self) -> int:
        """Bytes that a rank can still have for buffers, if all ranks here take as many."""
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0])
        return shutil.disk_usage(Config.from_environment().shm_dir).free // self.world_size

    def explain_all2all(
        self,
        *,
        max_tokens: int,
        hidden: int,
        topk: int,
        num_experts: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Choice:
        """Which backend such layers exchange tokens with, and why. Not collective.

        Free memory is that of this rank, until `all2all_for` has asked all of them.

        Args:
            max_tokens: the most that a rank ever brings.
            hidden: channels of a token.
            topk: experts that a token goes to.
            num_experts: of all ranks.
            dtype: of the tokens.

        Raises:
            UsageError: when no tokens are exchanged through this group.
            ConfigError: when a number is less than 1.
            CapabilityError: when the backend that was asked for by name cannot be used.
        """
        if self.all2all_backend is None:
            raise UsageError("no tokens are exchanged through this group; it is not 'ep' with use_all2all")
        sizes = (max_tokens, hidden, topk, num_experts, self.world_size)
        exchanged = Exchanged(*sizes, dtype.itemsize, self.device.type)
        return choose_backend(
            exchanged,
            _bytes_of_buffers(exchanged),
            self._free_here() if self._free_nbytes is None else self._free_nbytes,
            forced=self.all2all_backend,
            no_shared_memory=self.communicator.capabilities.no_shared_memory,
        )

    def all2all_for(
        self,
        *,
        max_tokens: int,
        hidden: int,
        topk: int,
        num_experts: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> All2AllManagerBase:
        """The manager that `explain_all2all` names, which lives as long as this group. **Collective.**

        Args:
            max_tokens: as for `explain_all2all`; the same on every rank, as all of them.
            hidden: as for `explain_all2all`.
            topk: as for `explain_all2all`.
            num_experts: as for `explain_all2all`.
            dtype: as for `explain_all2all`.

        Raises:
            UsageError, ConfigError, CapabilityError: as `explain_all2all` does; when the group has one rank.
        """
        if self._free_nbytes is None and self.use_all2all and self.cpu_group is not None:
            told = gather_bytes(self.cpu_group, msgspec.msgpack.encode(self._free_here()), SETUP_SECONDS)
            self._free_nbytes = min(msgspec.msgpack.decode(data, type=int) for data in told)
        choice = self.explain_all2all(
            max_tokens=max_tokens, hidden=hidden, topk=topk, num_experts=num_experts, dtype=dtype
        )
        if self.world_size == 1:
            raise UsageError("a group of one rank has nobody to exchange tokens with")
        return self._manager(choice.name)

    def _close_traffic(self) -> None:
        """Destroy the managers, all of them also where one raises."""
        managers = {id(m): m for m in (self.all2all_manager, *self._managers.values()) if m is not None}
        self.all2all_manager, self._managers = None, {}
        with contextlib.ExitStack() as stack:
            for manager in managers.values():
                stack.callback(manager.destroy)


def _bytes_of_buffers(exchanged: Exchanged) -> dict[str, int]:
    """What the buffers of each backend take of a rank's memory."""
    from tcomm.groups.moe.low_latency import size_hint

    config = EngineConfig.from_environment()
    sizes = (exchanged.max_tokens, exchanged.hidden, exchanged.world_size, exchanged.num_experts)
    slots = size_hint(*sizes)
    return {
        "deepep_high_throughput": config.deepep_buffer_size_mb << 20,
        "deepep_low_latency": slots,
        "nixl_ep": slots,
        "pplx": slots,
    }
