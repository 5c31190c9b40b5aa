"""Compiling and loading kernels ahead of their first call, so that nothing does so while a peer waits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tcomm.algorithms import ALGORITHMS
from tcomm.kernels import all_reduce, barrier, exchange, reduce_scatter
from tcomm.kernels.bound import compiling_only
from tcomm.memory.base import KernelArena
from tcomm.parts import broadcast_parts, exchange_parts, gather_parts, scatter_parts

__all__ = ["compile_ahead"]

_NUMEL = 16
"""Elements of a stand-in for each rank: whole vectors, as tensors of models are."""


def compile_ahead(arena: KernelArena, dtypes: Sequence[torch.dtype], ops: Sequence[str] = ("sum",)) -> None:
    """Compile and load every kernel for tensors of these dtypes that begin at a multiple of 16 bytes.

    Launches nothing. Kernels for other operations, or for tensors that begin elsewhere, are compiled at their
    first call. Nothing happens where kernels are interpreted.

    Args:
        arena: of the group, with staging.
        dtypes: element types; what no kernel reduces is only moved.
        ops: reduce operations.

    Raises:
        CapabilityError: while a graph is captured.
    """
    world, rank, rows = arena.world_size, arena.rank, arena.world_size if arena.is_virtual else 1
    sizes = [_NUMEL] * world
    with compiling_only():
        barrier.arrival_barrier(arena)
        for dtype in dtypes:
            x = torch.zeros(rows, world * _NUMEL, dtype=dtype, device=arena.device)
            x = x if arena.is_virtual else x[0]
            for op in ops:
                _compile_reductions(arena, x, op)
            ranks = range(world) if arena.is_virtual else [rank]
            tables = {
                "own range each": [exchange_parts([sizes] * world, r) for r in ranks],
                "one range for all": [gather_parts(sizes, r) for r in ranks],
                "one range for one": [gather_parts(sizes, r, 0) for r in ranks],
                "from one": [broadcast_parts(_NUMEL, world, r, 0) for r in ranks],
            }
            for parts in tables.values():
                for launcher in exchange.LAUNCHERS.values():
                    launcher(x, x, arena, parts)


def _compile_reductions(arena: KernelArena, x: torch.Tensor, op: str) -> None:
    ranks = range(arena.world_size) if arena.is_virtual else [arena.rank]
    parts = [scatter_parts([_NUMEL] * arena.world_size, r) for r in ranks]
    for name, launcher in all_reduce.LAUNCHERS.items():
        if _does("all_reduce", name, op, x.dtype):
            launcher(x, arena, op, out=x)
    for name, launcher in reduce_scatter.LAUNCHERS.items():
        if _does("reduce_scatter", name, op, x.dtype):
            launcher(x, x, arena, parts, op)


def _does(family: str, name: str, op: str, dtype: torch.dtype) -> bool:
    known = {algorithm.name: algorithm for algorithm in ALGORITHMS[family]}
    return not known[f"triton:{name}"].refusal(op, dtype)
