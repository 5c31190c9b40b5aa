"""Compiling and loading kernels ahead of their first call, so that nothing does so while a peer waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tcomm.algorithms import ALGORITHMS, GPU_ALGORITHMS
from tcomm.interpret import is_interpreted
from tcomm.kernels import all_reduce, barrier, exchange, multimem, reduce_scatter
from tcomm.kernels.bound import compiling_only
from tcomm.kernels.launch import ALWAYS_WIDE_TILES, tile_numel
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
    if is_interpreted():
        return
    with compiling_only():
        barrier.arrival_barrier(arena)
        for dtype in dtypes:
            # Parts that begin anywhere, parts of whole vectors, and long ones, which go in wider tiles.
            for numel in (1, _NUMEL, ALWAYS_WIDE_TILES * tile_numel(dtype.itemsize)):
                x = _stand_in(arena, numel, dtype)
                for op in ops:
                    _compile_reductions(arena, x, numel, op)
                _compile_moves(arena, x, numel)


def _stand_in(arena: KernelArena, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A part of `numel` elements for every rank, for each rank that a launch works for."""
    rows, length = arena.world_size if arena.is_virtual else 1, arena.world_size * numel
    padded = -(-length // _NUMEL) * _NUMEL
    x = torch.empty(rows, padded, dtype=dtype, device=arena.device)[:, :length]
    return x if arena.is_virtual else x[0]


def _ranks(arena: KernelArena) -> Sequence[int]:
    return range(arena.world_size) if arena.is_virtual else [arena.rank]


def _compile_moves(arena: KernelArena, x: torch.Tensor, numel: int) -> None:
    world, sizes = arena.world_size, [numel] * arena.world_size
    tables = {
        "own range each": [exchange_parts([sizes] * world, r) for r in _ranks(arena)],
        "one range for all": [gather_parts(sizes, r) for r in _ranks(arena)],
        "one range for one": [gather_parts(sizes, r, 0) for r in _ranks(arena)],
        "from one": [broadcast_parts(numel, world, r, 0) for r in _ranks(arena)],
    }
    for parts in tables.values():
        for launcher in exchange.LAUNCHERS.values():
            launcher(x, x, arena, parts)
    for launcher in _by_switch(arena).get("all_gather", {}).values():
        launcher(x, x, arena, gather_parts(sizes, arena.rank))


def _compile_reductions(arena: KernelArena, x: torch.Tensor, numel: int, op: str) -> None:
    parts = [scatter_parts([numel] * arena.world_size, r) for r in _ranks(arena)]
    by_switch = _by_switch(arena)
    for name, launcher in (all_reduce.LAUNCHERS | by_switch.get("all_reduce", {})).items():
        if _does("all_reduce", name, op, x.dtype):
            launcher(x, arena, op, out=x)
    for name, launcher in (reduce_scatter.LAUNCHERS | by_switch.get("reduce_scatter", {})).items():
        if _does("reduce_scatter", name, op, x.dtype):
            launcher(x, x, arena, parts, op)


def _by_switch(arena: KernelArena) -> dict[str, dict[str, Callable[..., torch.Tensor]]]:
    """Launchers of what a switch does, by family; none where there is none."""
    has_switch = arena.staging is not None and arena.staging.multicast != 0
    return multimem.LAUNCHERS if has_switch else {}


def _does(family: str, name: str, op: str, dtype: torch.dtype) -> bool:
    known = {algorithm.name: algorithm for algorithm in (*ALGORITHMS[family], *GPU_ALGORITHMS[family])}
    return not known[f"triton:{name}"].refusal(op, dtype)
