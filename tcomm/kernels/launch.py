"""Launching a kernel that waits: counted, hooked up when interpreted, its error raised afterwards."""

from __future__ import annotations

import collections
import functools
from typing import Any

import torch
import triton

from tcomm.errors import CapabilityError
from tcomm.interpret import is_interpreted
from tcomm.kernels.hooks import interpreting
from tcomm.memory.arena import Arena, Staging
from tcomm.memory.control import MAX_BLOCKS
from tcomm.signature import CallDescription

__all__ = [
    "COMPILED_MAX_REGISTERS",
    "COMPILED_THREADS",
    "common_constants",
    "grid_of",
    "launch",
    "launches",
    "refuse_host_memory",
    "staging_of",
    "tile_numel",
]

launches: collections.Counter[str] = collections.Counter()
"""How often each kernel was launched in this process, by name."""

COMPILED_THREADS = 256
"""Threads of a compiled program: 8 warps of 32, 4 waves of 64."""
COMPILED_MAX_REGISTERS = 128
"""`maxnreg` of a compiled kernel: without it ptxas spills of its own accord, to fit more blocks on an SM."""
# One 16-byte access per thread and source: with 16 sources in flight nothing spills.
_COMPILED_TILE_BYTES = 16 * COMPILED_THREADS
_COMPILED_BLOCKS = 16
_COMPILED_POLLS = 1 << 31
_INTERPRETED_BLOCKS = 2
_INTERPRETED_TILE = 65536


@functools.cache
def tile_numel(itemsize: int) -> int:
    """Elements a program handles at a time; large when interpreted, where each operation costs a lot."""
    return _INTERPRETED_TILE if is_interpreted() else _COMPILED_TILE_BYTES // itemsize


def grid_of(num_tiles: int) -> int:
    """Programs to launch: bounded, so that all are resident and each has its arrival words."""
    limit = _INTERPRETED_BLOCKS if is_interpreted() else _COMPILED_BLOCKS
    return max(1, min(num_tiles, limit, MAX_BLOCKS))


def staging_of(arena: Arena) -> Staging:
    """The staging memory of a group.

    Raises:
        CapabilityError: when it has none yet.
    """
    if arena.staging is None:
        raise CapabilityError("the group has no staging memory yet; call prepare() first")
    return arena.staging


def common_constants(arena: Arena, staging: Staging) -> dict[str, Any]:
    """Compile-time arguments that every kernel takes."""
    return {
        "WORLD": arena.world_size,
        "LANES": triton.next_power_of_2(arena.world_size),
        "LANE_HALF_BYTES": staging.layout.lane_half_bytes,
        "ATOMIC_POLL": torch.version.hip is not None,
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
    arena: Arena,
    call: CallDescription,
    timeout: float | None,
    *args: Any,
    **constants: Any,
) -> None:
    """Launch `kernel` on `num_blocks` programs as the next call of the group. **Collective.**

    Args:
        kernel: takes args, then the staging and pad tables, signature, rank and budget, then constants.
        num_blocks: the same on every rank.
        arena: whose epoch it advances.
        call: what it does, for the signature.
        timeout: seconds that it may wait; None: while the peers live.
        *args: of the kernel, ahead of those that every kernel takes.
        **constants: of the kernel, besides `common_constants`.

    Raises:
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: what it found while it waited.
        CapabilityError: when there is nothing to run it on.
    """
    staging = staging_of(arena)
    refuse_host_memory()
    channel = arena.channel
    epoch = channel.begin(call, timeout)
    launches[kernel.__name__] += 1
    with interpreting(channel):
        kernel[(num_blocks,)](
            *args,
            staging.buffer.table,
            arena.control.table,
            call.signature,
            arena.rank,
            _COMPILED_POLLS,
            **common_constants(arena, staging),
            **constants,
        )
    channel.after_kernel(epoch)
