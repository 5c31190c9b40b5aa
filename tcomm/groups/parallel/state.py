"""The groups that a process belongs to: made together, published together, taken down together."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tcomm.errors import UsageError
from tcomm.groups.all2all.surroundings import among, look_up_with
from tcomm.groups.arguments import UNSET, Timeout, Unset
from tcomm.groups.parallel.coordinator import GroupCoordinator
from tcomm.groups.parallel.layouts import Layout, Rows, inner_dp_rows
from tcomm.groups.parallel.making import watch_with
from tcomm.groups.parallel.parallel_config import ParallelConfig
from tcomm.groups.parallel.process_groups import resolve_local_rank
from tcomm.groups.stateless.same_node import count_nodes

__all__ = ["KINDS", "ParallelState", "current", "use"]

logger = logging.getLogger("tcomm")

KINDS: dict[str, str] = {
    "tp": "tensor model parallel group",
    "dcp": "decode context model parallel group",
    "pcp": "prefill context parallel group",
    "pp": "pipeline model parallel group",
    "dp": "data parallel group",
    "ep": "expert parallel group",
    "eplb": "expert load balancing group",
}
"""Kinds of model parallel groups, in the order in which they are made, and what errors call them."""
_QUEUED = frozenset({"tp", "dcp"})
_OF_EXPERTS = frozenset({"ep", "eplb"})
_NOT_INITIALIZED = "{what} is not initialized"
_NO_EXPERTS = (
    ". EP group is only created for MoE models with num_experts > 0. "
    "This function should only be called for MoE models."
)


class ParallelState:
    """The coordinators of a process. One is current at a time (`use`); a process may have several.

    Args:
        timeout: of all groups made here, as for `Communicator`.

    Attributes:
        world: all ranks; None before `init_world`.
        inner_dp_world: one data parallel replica, where it spans several hosts.
        groups: the model parallel groups by kind, a key of `KINDS`.
        node_count: number of hosts.
        use_kernels: whether groups made from now on use tcomm's own algorithms.
        generation: how often model parallel groups were made here.
    """

    def __init__(self, timeout: Timeout | Unset = UNSET) -> None:
        self.timeout = timeout
        self.world: GroupCoordinator | None = None
        self.inner_dp_world: GroupCoordinator | None = None
        self.groups: dict[str, GroupCoordinator] = {}
        self.node_count: int | None = None
        self.use_kernels = True
        self.generation = 0
        self._patched_tp: GroupCoordinator | None = None
        self._torch_world: dist.ProcessGroup | None = None
        self._pid = os.getpid()

    def group(self, kind: str) -> GroupCoordinator:
        """The group of a kind.

        Raises:
            UsageError: "... is not initialized".
        """
        if kind == "tp" and self._patched_tp is not None:
            return self._patched_tp
        found = self.groups.get(kind)
        if found is None:
            told = _NOT_INITIALIZED.format(what=KINDS[kind])
            raise UsageError(told + (_NO_EXPERTS if kind == "ep" else ""))
        return found

    def get_world(self) -> GroupCoordinator:
        """The group of all ranks.

        Raises:
            UsageError: "world group is not initialized".
        """
        if self.world is None:
            raise UsageError(_NOT_INITIALIZED.format(what="world group"))
        return self.world

    def get_inner_dp_world(self) -> GroupCoordinator:
        """The group of one data parallel replica that spans several hosts.

        Raises:
            UsageError: "inner dp world group is not initialized".
        """
        if self.inner_dp_world is None:
            raise UsageError(_NOT_INITIALIZED.format(what="inner dp world group"))
        return self.inner_dp_world

    def init_world(self, local_rank: int, backend: str, config: ParallelConfig | None = None) -> None:
        """Make the group of all ranks of torch.distributed, and count hosts. **Collective**, once.

        Called again, it only checks. Groups of an earlier world of torch.distributed are destroyed.

        Raises:
            UsageError: "world group already initialized with a different world size".
        """
        world_size = dist.get_world_size()
        self._forget_another_world()
        if self.world is not None:
            if self.world.world_size != world_size:
                raise UsageError("world group already initialized with a different world size")
            return
        with contextlib.ExitStack() as undo:
            world = self._make([list(range(world_size))], "world", local_rank, backend, with_device=False)
            undo.callback(world.destroy)
            nnodes = 1 if config is None else config.nnodes
            node_count = nnodes if nnodes > 1 else count_nodes(world.cpu_group)
            inner = self._make_inner_world(world, local_rank, backend, config)
            undo.pop_all()
        self.world, self.inner_dp_world, self.node_count = world, inner, node_count
        self._torch_world, self._pid = dist.group.WORLD, os.getpid()
        if world.control is not None:
            watch_with(world.control.check_peers)

    def _forget_another_world(self) -> None:
        """Let go of groups whose torch.distributed somebody has taken down and started anew."""
        if self.world is not None and self._torch_world is not dist.group.WORLD:
            logger.warning("torch.distributed was started anew: the groups of its world before are destroyed")
            self.destroy()

    def _make_inner_world(
        self, world: GroupCoordinator, local_rank: int, backend: str, config: ParallelConfig | None
    ) -> GroupCoordinator | None:
        if config is None or config.nnodes_within_dp <= 1:
            return None
        if config.data_parallel_size == 1:
            return world
        rows = inner_dp_rows(world.world_size, config.world_size, config.data_parallel_size)
        return self._make(rows, "inner_dp_world", local_rank, backend, with_device=False, with_queue=True)

    def init_model_parallel(
        self,
        layout: Layout,
        backend: str | None = None,
        *,
        with_experts: bool = True,
        with_eplb: bool = False,
        use_all2all: bool | None = None,
    ) -> None:
        """Make all groups of a layout, and then publish them. **Collective.**

        When one cannot be made, those made before are destroyed and nothing has changed.

        Args:
            layout: see `make_layout`.
            backend: of the device groups; None: as the world's.
            with_experts: make the `ep` group.
            with_eplb: make the `eplb` group.
            use_all2all: whether the `ep` group exchanges tokens; None: where DP groups have several ranks.

        Raises:
            UsageError: when there are groups already, or no world.
        """
        world = self.get_world()
        if self.groups:
            raise UsageError(f"{KINDS[next(iter(self.groups))]} is already initialized")
        backend = backend or str(dist.get_backend(world.device_group))
        wanted = {"ep": with_experts, "eplb": with_eplb}
        exchanges = any(len(row) > 1 for row in layout.dp) if use_all2all is None else use_all2all
        made: dict[str, GroupCoordinator] = {}
        with among(made, alone=True), contextlib.ExitStack() as undo:
            for kind in KINDS:
                if not wanted.get(kind, True):
                    continue
                made[kind] = self._make(
                    getattr(layout, kind),
                    kind,
                    world.local_rank,
                    backend,
                    with_queue=kind in _QUEUED,
                    use_all2all=kind == "ep" and exchanges,
                )
                undo.callback(made[kind].destroy)
            undo.pop_all()
        self.groups = made
        self.generation += 1
        ranks = ", ".join(f"{kind.upper()} rank {group.rank_in_group}" for kind, group in made.items())
        logger.info("rank %d of %d is %s", world.rank, world.world_size, ranks)

    def adopt_mesh(self, mesh: DeviceMesh, *, local_rank: int = -1, with_queues: bool = True) -> None:
        """Make groups of the dimensions of a mesh that are called as `KINDS`. **Collective** over the world.

        TP, DCP, PCP, PP and DP groups that the mesh lacks are groups of one rank; EP and EPLB groups are
        there where a dimension is called so. The mesh keeps its process groups.

        Args:
            mesh: with names for its dimensions, such as `("dp", "tp")`.
            local_rank: as for `GroupCoordinator.from_process_group`.
            with_queues: TP and DCP broadcast objects through message queues.

        Raises:
            UsageError: when a dimension has another name, or there are groups already.
        """
        names = (mesh.mesh_dim_names or ()) if isinstance(mesh, DeviceMesh) else ()
        if not names or set(names) - set(KINDS):
            raise UsageError(f"dimensions {names} of {mesh}; each needs a name out of {', '.join(KINDS)}")
        if self.groups:
            raise UsageError(f"{KINDS[next(iter(self.groups))]} is already initialized")
        self.init_world(resolve_local_rank(local_rank), str(dist.get_backend()))
        made: dict[str, GroupCoordinator] = {}
        with contextlib.ExitStack() as undo:
            for kind in KINDS:
                if kind in names:
                    made[kind] = self._adopt(mesh[kind], kind, local_rank, with_queues and kind in _QUEUED)
                elif kind not in _OF_EXPERTS:
                    world = self.get_world()
                    rows = [[rank] for rank in range(world.world_size)]
                    made[kind] = self._make(rows, kind, world.local_rank, str(dist.get_backend()))
                if kind in made:
                    undo.callback(made[kind].destroy)
            undo.pop_all()
        self.groups = made
        self.generation += 1

    def _adopt(self, mesh: DeviceMesh, kind: str, local_rank: int, with_queue: bool) -> GroupCoordinator:
        return GroupCoordinator.from_process_group(
            mesh,
            local_rank=local_rank,
            use_message_queue_broadcaster=with_queue,
            group_name=kind,
            use_kernels=self.use_kernels,
            timeout=self.timeout,
        )

    def destroy_model_parallel(self) -> None:
        """Destroy the model parallel groups, in the order in which they were made. Not collective."""
        groups, self.groups = self.groups, {}
        self._destroy(groups.values())

    def destroy(self) -> None:
        """Destroy everything that was made here. Not collective; may be called twice."""
        self.destroy_model_parallel()
        inner, self.inner_dp_world = self.inner_dp_world, None
        world, self.world = self.world, None
        self.node_count = None
        if world is not None:
            watch_with(None)
        self._destroy(group for group in (inner, world) if group is not None)

    def _destroy(self, groups: Iterable[GroupCoordinator]) -> None:
        """Destroy all of them, also when one raises. In a child after a fork they are its parent's."""
        if os.getpid() != self._pid:
            return
        with contextlib.ExitStack() as stack:
            for group in reversed(list(groups)):
                stack.callback(group.destroy)

    @property
    def is_foreign(self) -> bool:
        """Whether the groups belong to the process from which this one was forked."""
        return os.getpid() != self._pid and self.world is not None

    @contextlib.contextmanager
    def patched_tp(self, tp_group: GroupCoordinator) -> Iterator[None]:
        """Use another TP group inside.

        It stays its maker's to destroy.

        Raises:
            UsageError: "Should not call when it's already patched"; when there is no TP group, or `tp_group`
                is none.
        """
        if self._patched_tp is not None:
            raise UsageError("Should not call when it's already patched")
        if not isinstance(tp_group, GroupCoordinator):
            raise UsageError(f"{tp_group!r} is no GroupCoordinator to use as tensor parallel group")
        self.group("tp")
        self._patched_tp = tp_group
        try:
            yield
        finally:
            self._patched_tp = None

    def _make(
        self,
        rows: Rows,
        name: str,
        local_rank: int,
        backend: str,
        *,
        with_device: bool = True,
        with_queue: bool = False,
        use_all2all: bool = False,
    ) -> GroupCoordinator:
        return GroupCoordinator(
            rows,
            local_rank,
            backend,
            with_device,
            with_queue,
            name,
            use_all2all,
            use_kernels=self.use_kernels,
            timeout=self.timeout,
        )


_current = ParallelState()


def current() -> ParallelState:
    """The state that the module-level functions are a view of."""
    return _current


def _find(kind: str) -> GroupCoordinator | None:
    return _current.group(kind) if kind in _current.groups else None


look_up_with(_find)


@contextlib.contextmanager
def use(state: ParallelState) -> Iterator[ParallelState]:
    """Make `state` the current one inside, for all threads of the process."""
    global _current  # noqa: PLW0603
    before, _current = _current, state
    try:
        yield state
    finally:
        _current = before
