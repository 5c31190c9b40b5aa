"""Launching a kernel that works over several nodes: what it sees of ranks that only NVSHMEM reaches."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from tcomm.errors import ConfigError
from tcomm.kernels.bound import launches
from tcomm.kernels.heap import Heap, mapped
from tcomm.kernels.hooks import interpreting
from tcomm.kernels.launch import common_constants, refuse_host_memory, staging_of
from tcomm.memory.arena import Arena
from tcomm.memory.base import SymmetricBuffer
from tcomm.memory.layout import ALIGNMENT
from tcomm.signature import CallDescription

__all__ = ["NODES_MAX_REGISTERS", "launch_on_nodes", "near_table", "reduce_regions"]

NODES_MAX_REGISTERS = 248
"""`maxnreg` of a kernel that NVSHMEM is linked into, which spills at 168. One block on an SM is enough."""

_near: weakref.WeakKeyDictionary[SymmetricBuffer, dict[int, torch.Tensor]] = weakref.WeakKeyDictionary()


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
    arena: Arena,
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
        CapabilityError: when there is nothing to run it on.
    """
    staging, channel = staging_of(arena), arena.channel
    refuse_host_memory()
    numbers = list(range(arena.world_size)) if pes is None else list(pes)
    if len(numbers) != arena.world_size:
        raise ConfigError(f"{len(numbers)} PEs for {arena.world_size} ranks; give one for each")
    heap = Heap(arena.rank, numbers, arena.control, [staging.buffer])
    shared = common_constants(arena, staging)
    del shared["VIRTUAL"]
    epoch = channel.begin(call, timeout)
    launches[kernel.__name__] += 1
    with interpreting(channel), mapped(heap):
        kernel[(num_blocks,)](
            *args,
            near_table(staging.buffer, nodes),
            near_table(arena.control, nodes),
            torch.tensor(numbers, dtype=torch.int64),
            call.signature,
            arena.rank,
            0,
            **shared,
            NODES=nodes,
            **constants,
        )
    channel.after_kernel(epoch, everyone=True)
