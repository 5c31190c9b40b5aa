"""A group as an inference engine sees it: its ranks, its process groups, its tensors and its objects."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tcomm.config import Config, resolve_timeout
from tcomm.errors import ConfigError
from tcomm.groups import graphs
from tcomm.groups.arguments import UNSET, Timeout, Unset
from tcomm.groups.communicator import Communicator
from tcomm.groups.compiled import registry
from tcomm.groups.device.cpu import CpuCommunicator
from tcomm.groups.device.cuda import CudaCommunicator
from tcomm.groups.device.loopback import Loopback
from tcomm.groups.parallel.coordinator_arguments import (
    backend_of,
    check_initialized,
    local_rank_of,
    name_of,
    process_group_of,
    rows_of,
)
from tcomm.groups.parallel.current_config import current_parallel_config
from tcomm.groups.parallel.lanes import Lanes
from tcomm.groups.parallel.making import agree_on_name, making
from tcomm.groups.parallel.process_groups import (
    ProcessGroups,
    device_of,
    find_my_ranks,
    new_process_group,
    resolve_local_rank,
)
from tcomm.groups.parallel.tensor_dicts import TensorDictVerbs

__all__ = ["GroupCoordinator"]


class GroupCoordinator(TensorDictVerbs):
    """One of a set of groups that divide the world, and what its ranks do together. **Collective** over it.

    It has a device communicator for tensors; a control communicator for the host's barriers, objects and
    tensors; and lanes for messages between two ranks. A group of one rank has none of them.

    Args:
        group_ranks: all groups; each global rank is in exactly one. Lists may differ in length.
        local_rank: number of this process on its host, and of its GPU.
        torch_distributed_backend: of the device's process group. `gloo` moves host memory; with any other
            the device is a GPU where there is one.
        use_device_communicator: make a device communicator, without which only objects, `broadcast` and
            `barrier` work.
        use_message_queue_broadcaster: `broadcast_object` goes through message queues.
        group_name: the same on every rank; `unique_name` is `name:number`.
        use_all2all: make what an expert parallel group dispatches with.
        use_kernels: with False every tensor goes to torch.distributed (see `set_custom_all_reduce`).
        timeout: for every call: seconds, a profile or None, as for `Communicator`.

    Attributes:
        rank, ranks: this process, and the members of its group, by global rank.
        world_size, rank_in_group, local_rank: of this group, in it, and on the host.
        device: `cuda:{local_rank}` or `cpu`.
        device_group, cpu_group: process groups of torch.distributed.
        device_communicator, mq_broadcaster: None where there is none.
        control: the communicator of the host; None in a group of one rank.
        destroyed: whether `destroy` was called.

    Raises:
        UsageError: when `group_ranks` do not divide the world, there is no world yet, or an argument makes no
            sense; before anything is created.
        RendezvousError, GroupMismatchError, CapabilityError: as `Communicator` does.
    """

    def __init__(
        self,
        group_ranks: Sequence[Sequence[int]],
        local_rank: int,
        torch_distributed_backend: str,
        use_device_communicator: bool,
        use_message_queue_broadcaster: bool = False,
        group_name: str | None = None,
        use_all2all: bool = False,
        *,
        use_kernels: bool = True,
        timeout: Timeout | Unset = UNSET,
    ) -> None:
        check_initialized()
        self.group_ranks = rows_of(group_ranks)
        ranks = find_my_ranks(self.group_ranks, dist.get_rank(), dist.get_world_size())
        self.torch_distributed_backend = backend = backend_of(torch_distributed_backend)
        self._place(ranks, local_rank_of(local_rank), timeout)
        with (
            self._whole_or_nothing(),
            making(name_of(group_name), self.group_ranks, backend, self.timeout) as unique_name,
        ):
            self.unique_name = unique_name
            groups = ProcessGroups.create(self.group_ranks, backend, unique_name, self.timeout)
            self._open(
                groups, use_device_communicator, use_message_queue_broadcaster, use_all2all, use_kernels
            )

    @classmethod
    def from_process_group(
        cls,
        group: dist.ProcessGroup | DeviceMesh,
        *,
        local_rank: int = -1,
        use_message_queue_broadcaster: bool = False,
        group_name: str | None = None,
        use_all2all: bool = False,
        use_kernels: bool = True,
        timeout: Timeout | Unset = UNSET,
    ) -> Self:
        """A coordinator of a group that exists, and stays when the coordinator goes. **Collective.**

        Args:
            group: a process group, or a mesh of one dimension such as `mesh["tp"]`.
            local_rank: -1: LOCAL_RANK, or the global rank where that is unset.
            use_message_queue_broadcaster: as for the constructor.
            group_name: as for the constructor.
            use_all2all: as for the constructor.
            use_kernels: as for the constructor.
            timeout: as for the constructor.

        Raises:
            UsageError: for a mesh of several dimensions, a group without gloo, and what is no group.
        """
        check_initialized()
        group = process_group_of(group)
        name, local_rank = name_of(group_name), local_rank_of(local_rank)
        groups = ProcessGroups.adopt(group)
        coordinator = cls.__new__(cls)
        ranks = list(dist.get_process_group_ranks(group))
        coordinator.group_ranks = [ranks]
        coordinator.torch_distributed_backend = str(dist.get_backend(group))
        coordinator._place(ranks, resolve_local_rank(local_rank), timeout)
        coordinator.unique_name = agree_on_name(name, group)
        with coordinator._whole_or_nothing():
            coordinator._open(groups, True, use_message_queue_broadcaster, use_all2all, use_kernels)
        return coordinator

    def _place(self, ranks: list[int], local_rank: int, timeout: Timeout | Unset) -> None:
        given = Config.from_environment().timeout if isinstance(timeout, Unset) else timeout
        self.timeout = resolve_timeout(given)
        self.rank = dist.get_rank()
        self.ranks = ranks
        self.world_size = len(ranks)
        self.rank_in_group = ranks.index(self.rank)
        self.local_rank = local_rank
        self.device = device_of(self.torch_distributed_backend, local_rank)
        self.destroyed = False
        self.device_communicator = None
        self.control = None
        self.lanes = None
        self.mq_broadcaster = None
        self._queues = {}
        self._loopback = Loopback()
        self._pending_isends = collections.deque()

    def _open(
        self,
        groups: ProcessGroups,
        use_device_communicator: bool,
        use_message_queue_broadcaster: bool,
        use_all2all: bool,
        use_kernels: bool,
    ) -> None:
        self._groups = groups
        self.device_group, self.cpu_group = groups.device_group, groups.cpu_group
        self.use_device_communicator = use_device_communicator
        self._uses_queues = use_message_queue_broadcaster
        registry.register(self)
        if self.world_size == 1:
            return
        if use_device_communicator:
            self.device_communicator = self._make_device_communicator(use_all2all, use_kernels)
        self.control = self._make_control()
        self.lanes = Lanes(self.control)
        if use_message_queue_broadcaster:
            self.mq_broadcaster = self._queue_from(0)

    @contextlib.contextmanager
    def _whole_or_nothing(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            if hasattr(self, "_groups"):
                self.destroy()
            raise

    def _make_device_communicator(self, use_all2all: bool, use_kernels: bool) -> Any:
        kind = CudaCommunicator if self.device.type == "cuda" else CpuCommunicator
        config = current_parallel_config()
        return kind(
            self.cpu_group,
            self.device,
            self.device_group,
            self.unique_name,
            use_all2all=use_all2all,
            use_kernels=use_kernels,
            all2all_backend=None if config is None else config.all2all_backend,
            timeout=self.timeout,
        )

    def _make_control(self) -> Communicator:
        """For host memory: the device communicator's own where that is its device."""
        if self.device_communicator is not None and self.device.type == "cpu":
            return self.device_communicator.communicator
        return Communicator(self.cpu_group, name=f"{self.unique_name}/host", timeout=self.timeout)

    @property
    def first_rank(self) -> int:
        """Global rank of the first member."""
        return self.ranks[0]

    @property
    def last_rank(self) -> int:
        """Global rank of the last member."""
        return self.ranks[-1]

    @property
    def is_first_rank(self) -> bool:
        """Whether this is the first member."""
        return self.rank == self.first_rank

    @property
    def is_last_rank(self) -> bool:
        """Whether this is the last member."""
        return self.rank == self.last_rank

    @property
    def next_rank(self) -> int:
        """Global rank of the next member; the first follows the last."""
        return self.ranks[(self.rank_in_group + 1) % self.world_size]

    @property
    def prev_rank(self) -> int:
        """Global rank of the member before; the last comes before the first."""
        return self.ranks[(self.rank_in_group - 1) % self.world_size]

    @contextlib.contextmanager
    def graph_capture(
        self, graph_capture_context: graphs.GraphCaptureContext | None = None
    ) -> Iterator[graphs.GraphCaptureContext]:
        """Surround code that captures graphs in which this group is used: see `tcomm.graph_capture`.

        **Collective.** On a CPU nothing is captured and the code inside runs as it is.

        Raises:
            ConfigError: when the context is none.
        """
        self._check_alive()
        context = graph_capture_context
        if context is not None and not isinstance(context, graphs.GraphCaptureContext):
            raise ConfigError(f"a context of graph_capture is a GraphCaptureContext or None, not {context!r}")
        used = [] if self.device_communicator is None else [self.device_communicator.communicator]
        with graphs.graph_capture(*used, device=self.device, context=context) as entered:
            yield entered

    def prepare_communication_buffer_for_model(self, model: torch.nn.Module) -> None:
        """Make what the model's layers will need: see the device communicator's method."""
        self._experts.prepare_communication_buffer_for_model(model)

    def make_sibling_device_group(self, group_desc: str | None = None) -> dist.ProcessGroup:
        """Another process group of the same ranks and backend, which ends with this one.

        **Collective** over the world. Not for a coordinator of a group that somebody else made.
        """
        self._check_alive()
        desc = group_desc or f"{self.unique_name}/sibling"
        sibling = new_process_group(self.group_ranks, self.torch_distributed_backend, desc, self.timeout)
        self._groups.owned.append(sibling)
        return sibling

    def destroy(self) -> None:
        """Give everything back: the communicators, the queues, and then the process groups made here.

        Not collective, and may be called twice.
        """
        self.destroyed = True
        queues, self._queues, self.mq_broadcaster = self._queues, {}, None
        for queue in queues.values():
            queue.shutdown()
        if self.lanes is not None:
            self.lanes.close()
        if self.control is not None:
            self.control.close()
        if self.device_communicator is not None:
            self.device_communicator.destroy()
        self.lanes = self.control = self.device_communicator = None
        self._groups.destroy()

    def __repr__(self) -> str:
        state = " destroyed" if self.destroyed else ""
        return f"<GroupCoordinator {self.unique_name!r}{state} rank {self.rank_in_group} of {self.ranks}>"
