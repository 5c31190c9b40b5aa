"""Launching a kernel that waits: counted, by whatever runs kernels here, its error raised afterwards."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton

from tcomm.errors import CapabilityError, ConfigError
from tcomm.interpret import is_interpreted
from tcomm.kernels.bound import (
    COMPILED_THREADS,
    budget_of,
    compile_and_load,
    compiles_only,
    launch_compiled,
    launches,
)
from tcomm.kernels.hooks import interpreting
from tcomm.kernels.schedule import run_in_turns
from tcomm.memory.base import KernelArena, Staging
from tcomm.memory.control import MAX_BLOCKS
from tcomm.signature import CallDescription

__all__ = [
    "ALWAYS_WIDE_TILES",
    "common_constants",
    "grid_of",
    "is_dense",
    "launch",
    "launch_part",
    "launches",
    "multicast_staging_of",
    "narrow_tile_of",
    "refuse_host_memory",
    "rows_of",
    "staging_of",
    "tile_numel",
    "tile_of",
]

# One 16-byte access per thread and source: with 16 sources in flight nothing spills.
_COMPILED_TILE_BYTES = 16 * COMPILED_THREADS
_COMPILED_BLOCKS = 16
_MOST_ACCESSES, _WIDEST = 16, 4
ALWAYS_WIDE_TILES = 2 * MAX_BLOCKS * _WIDEST
"""A message of so many narrow tiles goes in wide ones, however many ranks there are."""
_INTERPRETED_BLOCKS = 2
_INTERPRETED_TILE = 65536
_ROW_BYTES = 16


@functools.cache
def tile_numel(itemsize: int) -> int:
    """Elements a program handles at a time; large when interpreted, where each operation costs a lot."""
    return _INTERPRETED_TILE if is_interpreted() else _COMPILED_TILE_BYTES // itemsize


def narrow_tile_of(itemsize: int, numel: int) -> int:
    """`tile_numel`, or when interpreted no more than `numel` fill: what is masked off costs time too.

    Args:
        itemsize: bytes an element.
        numel: elements that one rank handles; the same on every rank.
    """
    tile = tile_numel(itemsize)
    return min(tile, triton.next_power_of_2(max(1, numel))) if is_interpreted() else tile


def tile_of(itemsize: int, numel: int, sources: int = 1) -> int:
    """Elements that a program handles at a time of a message of `numel`; more where there are plenty.

    A thread that has one access under way waits most of its time, and registers hold about sixteen.

    Args:
        itemsize: bytes an element.
        numel: elements that one rank handles; the same on every rank.
        sources: accesses that belong to one element of a result: ranks that are summed up, else 1.
    """
    tile = narrow_tile_of(itemsize, numel)
    wide = tile * max(1, min(_MOST_ACCESSES // triton.next_power_of_2(sources), _WIDEST))
    # Wide tiles take more registers on AMD than two blocks a CU have.
    is_long = numel >= 2 * MAX_BLOCKS * wide and torch.version.hip is None
    return wide if is_long and not is_interpreted() else tile


def grid_of(num_tiles: int, limit: int = _COMPILED_BLOCKS) -> int:
    """Programs to launch for a rank: bounded, so that all are resident and each has its arrival words."""
    limit = _INTERPRETED_BLOCKS if is_interpreted() else limit
    return max(1, min(num_tiles, limit, MAX_BLOCKS))


def staging_of(arena: KernelArena) -> Staging:
    """The staging memory of a group.

    Raises:
        CapabilityError: when it has none yet.
    """
    if arena.staging is None:
        raise CapabilityError("the group has no staging memory yet; call prepare() first")
    return arena.staging


def multicast_staging_of(arena: KernelArena) -> Staging:
    """The staging memory of a group that multimem instructions reach.

    Raises:
        CapabilityError: when they do not, or there is none yet.
    """
    if is_interpreted():
        raise CapabilityError("multimem instructions need a GPU; kernels are interpreted in this process")
    if arena.is_virtual:
        raise CapabilityError("virtual ranks share one device, and multicast reaches each device once")
    staging = staging_of(arena)
    if staging.multicast == 0:
        raise CapabilityError("the fabric has no multicast for this group: its staging has no such address")
    return staging


def rows_of(x: torch.Tensor, arena: KernelArena) -> torch.Tensor:
    """[rows, numel] view of x: a row for each rank that a launch works for, which is one unless virtual.

    Args:
        x: contiguous; of virtual ranks [W, ...], where each rank's tensor is.
        arena: of the group.

    Raises:
        ConfigError: when rows are missing, or do not begin at multiples of 16 bytes.
    """
    if not arena.is_virtual:
        return x.as_strided((1, x.numel()), (x.numel(), 1))
    if x.dim() == 0 or x.shape[0] != arena.world_size:
        raise ConfigError(
            f"a tensor {list(x.shape)} has not one row for each of {arena.world_size} virtual ranks"
        )
    step = x.stride(0) * x.itemsize if len(x) > 1 else 0
    if x[0].numel() and (step % _ROW_BYTES or x.data_ptr() % _ROW_BYTES):
        raise ConfigError(
            f"rows {step} bytes apart: those of virtual ranks begin at multiples of {_ROW_BYTES} bytes; "
            "make the tensor by VirtualRanks.empty()"
        )
    # A row may be followed by padding, so the whole need not be contiguous.
    return x.as_strided((arena.world_size, x[0].numel()), (x.stride(0), 1))


def is_dense(x: torch.Tensor, arena: KernelArena) -> bool:
    """Whether each rank's tensor is contiguous."""
    return (
        x.is_contiguous() if not arena.is_virtual or x.dim() == 0 else all(map(torch.Tensor.is_contiguous, x))
    )


def common_constants(arena: KernelArena, staging: Staging) -> dict[str, Any]:
    """Compile-time arguments that every kernel takes."""
    return {
        "WORLD": arena.world_size,
        "LANES": triton.next_power_of_2(arena.world_size),
        "LANE_HALF_BYTES": staging.layout.lane_half_bytes,
        "ATOMIC_POLL": torch.version.hip is not None,
        "VIRTUAL": arena.is_virtual,
    }


def refuse_host_memory() -> None:
    """Check that a kernel can run on host memory here.

    Raises:
        CapabilityError: when it cannot.
    """
    if not is_interpreted():
        raise CapabilityError(
            "kernels are compiled in this process and the tensors are in host memory; set TRITON_INTERPRET=1 "
            "before the first import of triton to interpret them"
        )


def launch(
    kernel: Any,
    num_blocks: int,
    arena: KernelArena,
    call: CallDescription,
    timeout: float | None,
    *args: Any,
    **constants: Any,
) -> None:
    """Launch `kernel` on `num_blocks` programs a rank as the next call of the group. **Collective.**

    Args:
        kernel: takes args, then the staging and pad tables, signature, rank and budget, then constants.
        num_blocks: the same on every rank.
        arena: whose epoch it advances.
        call: what it does, for the signature.
        timeout: seconds that it may wait; None: while the peers live.
        *args: of the kernel, ahead of those that every kernel takes: x, out and their strides first.
        **constants: of the kernel, besides `common_constants`.

    Raises:
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: what it found while it waited.
        CapabilityError: when there is nothing to run it on.
    """
    epoch = launch_part(kernel, num_blocks, arena, call, timeout, None, *args, **constants)
    if epoch is not None:
        arena.channel.after_kernel(epoch)


def launch_part(
    kernel: Any,
    num_blocks: int,
    arena: KernelArena,
    call: CallDescription,
    timeout: float | None,
    epoch: int | None,
    *args: Any,
    **constants: Any,
) -> int | None:
    """Launch one of the kernels that make a call together; `arena.channel.after_kernel` follows the last.

    Args:
        kernel: as for `launch`.
        num_blocks: as for `launch`; each part has its own number.
        arena: as for `launch`.
        call: the same for all parts.
        timeout: as for `launch`.
        epoch: None for the first part, which begins the call; what that returned for the others.
        *args: as for `launch`.
        **constants: as for `launch`.

    Returns:
        The epoch of the call; None where kernels are only compiled.

    Raises:
        PeerLostError, PeerTimeoutError: when the group was given up before.
        CapabilityError: when there is nothing to run it on.
    """
    staging = staging_of(arena)
    if arena.device.type == "cpu":
        refuse_host_memory()
    given = {**common_constants(arena, staging), **constants}
    values = (*args, staging.buffer.table, arena.control.table, call.signature)
    if not is_interpreted():
        # Before the call counts: what is refused here was not made.
        compile_and_load(kernel, arena, values, given)
    if compiles_only():
        return None
    channel = arena.channel
    begun = channel.begin(call, timeout) if epoch is None else epoch

    def interpret(rank: int) -> None:
        launches[kernel.__name__] += 1
        kernel[(num_blocks,)](*values, rank, 0, **given)

    if not is_interpreted():
        launch_compiled(kernel, num_blocks, arena, call, values, budget_of(timeout), given)
    elif arena.is_virtual:
        run_in_turns(arena.launch_parts, interpret, timeout, look=channel.kernel_pause)
    else:
        with interpreting(channel):
            interpret(arena.rank)
    return begun
