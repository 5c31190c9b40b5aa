"""Launching a kernel that works over several nodes: what it sees of ranks that only NVSHMEM reaches."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tcomm.errors import CapabilityError, ConfigError
from tcomm.interpret import is_interpreted
from tcomm.kernels.bound import budget_of, compile_and_load, compiles_only, launch_compiled, launches
from tcomm.kernels.heap import Heap, mapped
from tcomm.kernels.hooks import interpreting
from tcomm.kernels.launch import common_constants, refuse_host_memory, staging_of
from tcomm.kernels.nvshmem_modules import NvshmemModules, why_not_linked
from tcomm.memory.base import KernelArena, SymmetricBuffer
from tcomm.memory.device_arena import DeviceArena
from tcomm.memory.layout import ALIGNMENT
from tcomm.memory.nvshmem import NvshmemTransport
from tcomm.signature import CallDescription

__all__ = ["NODES_MAX_REGISTERS", "NvshmemLink", "launch_on_nodes", "near_table", "reduce_regions"]

NODES_MAX_REGISTERS = 248
"""`maxnreg` of a kernel that NVSHMEM is linked into, which spills at 168. One block on an SM is enough."""

_near: weakref.WeakKeyDictionary[SymmetricBuffer, dict[int, torch.Tensor]] = weakref.WeakKeyDictionary()
_pes: weakref.WeakKeyDictionary[SymmetricBuffer, dict[tuple[int, ...], torch.Tensor]]
_pes = weakref.WeakKeyDictionary()
_modules: dict[int, NvshmemModules] = {}


class NvshmemLink:
    """NVSHMEM, linked into kernels for the device of one transport. What is loaded is known per process.

    Args:
        transport: whose bitcode and library are of one version.
    """

    def __init__(self, transport: NvshmemTransport) -> None:
        self.key = str(transport.bitcode.path)
        self.options: Mapping[str, Any] = transport.bitcode.link_options | {"maxnreg": NODES_MAX_REGISTERS}
        bindings = transport.library.bindings
        known = _modules.get(id(bindings))
        if known is None:
            known = _modules[id(bindings)] = NvshmemModules(
                bindings.cumodule_init, bindings.cumodule_finalize
            )
            transport.on_close(lambda: _modules.pop(id(bindings)).finalise())
        self._modules = known

    def is_ready(self, compiled: Any) -> bool:
        """Whether NVSHMEM knows the module of a compiled kernel."""
        return self._modules.knows(compiled)

    def get_ready(self, compiled: Any) -> None:
        """Let NVSHMEM fill in the state of a loaded module, once."""
        self._modules.initialise(compiled)


def near_table(buffer: SymmetricBuffer, nodes: int) -> torch.Tensor:
    """[W] int64: addresses of the buffers of ranks of this node, and 0 for all others.

    Made once: a captured graph holds it as long as the buffer lives.
    """
    made = _near.setdefault(buffer, {})
    if nodes not in made:
        local = buffer.world_size // nodes
        node = buffer.rank // local
        table = torch.zeros_like(buffer.table)
        table[node * local : (node + 1) * local] = buffer.table[node * local : (node + 1) * local]
        made[nodes] = table
    return made[nodes]


def _pes_table(buffer: SymmetricBuffer, numbers: Sequence[int]) -> torch.Tensor:
    """[W] int64: the PE of each rank, where the tables of `buffer` are, and for as long."""
    made = _pes.setdefault(buffer, {})
    key = tuple(numbers)
    if key not in made:
        made[key] = torch.tensor(key, dtype=torch.int64, device=buffer.table.device)
    return made[key]


def reduce_regions(half_bytes: int, nodes: int, local: int, widening: int) -> tuple[int, int]:
    """How a half is divided for an all-reduce: `[ x, then the result | a slot for every node ]`.

    Args:
        half_bytes: of the staging.
        nodes: how many.
        local: ranks of a node.
        widening: bytes of the accumulator for one byte of x.

    Returns:
        Bytes of a message that fits, and of a slot: of a slice of it, in the accumulator's type.
    """
    room = half_bytes - nodes * (widening + 1) * ALIGNMENT
    capacity = max(room * local // (local + nodes * widening), 0) // ALIGNMENT * ALIGNMENT
    return capacity, (half_bytes - capacity) // nodes // ALIGNMENT * ALIGNMENT


def launch_on_nodes(
    kernel: Any,
    num_blocks: int,
    arena: KernelArena,
    nodes: int,
    pes: Sequence[int] | None,
    call: CallDescription,
    timeout: float | None,
    *args: Any,
    **constants: Any,
) -> None:
    """`launch` of a kernel that takes tables of this node's ranks and the PEs of all. **Collective.**

    Raises:
        ConfigError: when the PEs are not one for each rank.
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: what it found while it waited.
        CapabilityError: when there is nothing to run it on, or its memory is not NVSHMEM's; while a graph is
            captured, when something has yet to be made, compiled or loaded.
    """
    staging, channel = staging_of(arena), arena.channel
    numbers = list(range(arena.world_size)) if pes is None else list(pes)
    if len(numbers) != arena.world_size:
        raise ConfigError(f"{len(numbers)} PEs for {arena.world_size} ranks; give one for each")
    if arena.device.type == "cpu":
        refuse_host_memory()
    given = common_constants(arena, staging) | {"NODES": nodes} | constants
    del given["VIRTUAL"]
    link = None if is_interpreted() else _link_of(arena)
    values = (*args, *_tables(arena, staging.buffer, nodes, numbers), call.signature)
    if compiles_only():
        if link is not None:
            compile_and_load(kernel, arena, values, given, link)
        return
    epoch = channel.begin(call, timeout)
    if link is not None:
        launch_compiled(kernel, num_blocks, arena, call, values, budget_of(timeout), given, link)
    else:
        launches[kernel.__name__] += 1
        heap = Heap(arena.rank, numbers, arena.control, [staging.buffer])
        with interpreting(channel), mapped(heap):
            kernel[(num_blocks,)](*values, arena.rank, 0, **given)
    channel.after_kernel(epoch, everyone=True)


def _tables(
    arena: KernelArena, staging: SymmetricBuffer, nodes: int, numbers: Sequence[int]
) -> tuple[torch.Tensor, ...]:
    """What the kernel takes for staging, pages and PEs; made once."""
    known = nodes in _near.get(staging, {}) and tuple(numbers) in _pes.get(arena.control, {})
    if not known:
        arena.runtime.refuse_in_capture("tables of addresses have to be made")
    return near_table(staging, nodes), near_table(arena.control, nodes), _pes_table(arena.control, numbers)


def _link_of(arena: KernelArena) -> NvshmemLink:
    """What a compiled kernel over nodes links.

    Raises:
        CapabilityError: when the memory is not NVSHMEM's, or this Triton cannot link it.
    """
    transport = arena.nvshmem if isinstance(arena, DeviceArena) else None
    if transport is None:
        raise CapabilityError(
            "a kernel over nodes needs pages and staging in NVSHMEM's memory; those of this group are not"
        )
    if problem := why_not_linked():
        raise CapabilityError(problem)
    return NvshmemLink(transport)
