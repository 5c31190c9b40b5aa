"""What a call of each verb comes to: pure functions of what the ranks agree on, checked before they send."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

from tcomm.algorithms import reduce_op_name
from tcomm.errors import ConfigError
from tcomm.groups.arguments import check_dim, check_rank, check_sizes, dtype_name, refuse_integer_average
from tcomm.parts import Parts, broadcast_parts, exchange_parts, gather_parts, scatter_parts
from tcomm.signature import CallDescription

__all__ = ["JOBS", "Caller", "Chunks", "Job"]


@dataclasses.dataclass(frozen=True)
class Caller:
    """Who calls, and with what kind of tensor."""

    rank: int
    """This process, within the group."""
    world_size: int
    """Number of ranks."""
    shape: torch.Size
    """Of the input."""
    dtype: torch.dtype
    """Of input and output."""


@dataclasses.dataclass(frozen=True)
class Chunks:
    """A tensor whose parts along `dim` are wanted one after another in memory."""

    shape: tuple[int, ...]
    """Of the whole."""
    dim: int
    """Along which it falls into parts."""
    sizes: tuple[int, ...]
    """Length of each part along `dim`."""

    @property
    def is_flat(self) -> bool:
        """Whether they lie one after another already."""
        return math.prod(self.shape[: self.dim]) == 1

    def pack(self, whole: torch.Tensor, flat: torch.Tensor) -> None:
        """Write the parts of `whole` one after another into `flat`."""
        for part, place in self._pairs(whole, flat):
            place.copy_(part)

    def unpack(self, flat: torch.Tensor, whole: torch.Tensor) -> None:
        """Put parts that lie one after another in `flat` where they belong."""
        for part, place in self._pairs(whole, flat):
            part.copy_(place)

    def _pairs(self, whole: torch.Tensor, flat: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        parts = whole.view(self.shape).split(list(self.sizes), self.dim)
        places = flat.view(-1).split([part.numel() for part in parts])
        return [(part, place.view(part.shape)) for part, place in zip(parts, places, strict=True)]


@dataclasses.dataclass(frozen=True)
class Job:
    """One kind of call, in the terms that engines and torch.distributed are given."""

    call: CallDescription
    """What the ranks compare, but for the algorithm."""
    dtype: torch.dtype
    """Element type."""
    nbytes: int
    """As nccl-tests counts them; the same on every rank."""
    shape: torch.Size | None
    """Of the result; None where this rank gets none."""
    parts: Parts | None = None
    """Which range goes where; None where everything goes everywhere."""
    packs: Chunks | None = None
    """How the input is taken apart, where it does not lie so."""
    unpacks: Chunks | None = None
    """How the result is put together, where it does not lie so."""

    @property
    def may_alias(self) -> bool:
        """Whether the result may go to the input itself, every part of it staying where it is."""
        parts = self.parts
        if self.packs is not None or self.unpacks is not None:
            return False
        if parts is None or self.call.reduce or self.call.op == "broadcast":
            return True
        return parts.sends == parts.receives


def _nbytes(numel: int, dtype: torch.dtype) -> int:
    return numel * dtype.itemsize


def _reduction(op: object, dtype: torch.dtype) -> str:
    reduce = reduce_op_name(op)
    refuse_integer_average(reduce, dtype)
    return reduce


def _replaced(shape: Sequence[int], dim: int, length: int) -> torch.Size:
    return torch.Size([*shape[:dim], length, *shape[dim + 1 :]])


def _unless_flat(chunks: Chunks) -> Chunks | None:
    return None if chunks.is_flat else chunks


def _all_reduce(caller: Caller, op: object) -> Job:
    reduce = _reduction(op, caller.dtype)
    call = CallDescription("all_reduce", dtype_name(caller.dtype), tuple(caller.shape), reduce)
    return Job(call, caller.dtype, _nbytes(caller.shape.numel(), caller.dtype), caller.shape)


def _broadcast(caller: Caller, root: int) -> Job:
    root = check_rank("broadcast", "root", root, caller.world_size)
    call = CallDescription("broadcast", dtype_name(caller.dtype), tuple(caller.shape), root=root)
    numel = caller.shape.numel()
    parts = broadcast_parts(numel, caller.world_size, caller.rank, root)
    return Job(call, caller.dtype, _nbytes(numel, caller.dtype), caller.shape, parts)


def _reduce(caller: Caller, root: int, op: object) -> Job:
    root = check_rank("reduce", "root", root, caller.world_size)
    reduce = _reduction(op, caller.dtype)
    call = CallDescription("reduce", dtype_name(caller.dtype), tuple(caller.shape), reduce, root)
    numel = caller.shape.numel()
    sizes = [numel if rank == root else 0 for rank in range(caller.world_size)]
    shape = caller.shape if caller.rank == root else None
    parts = scatter_parts(sizes, caller.rank)
    return Job(call, caller.dtype, _nbytes(numel, caller.dtype), shape, parts)


def _all_gather_single(caller: Caller, dim: int) -> Job:
    dim = check_dim("all_gather_single", caller.shape, dim)
    sizes = (caller.shape[dim],) * caller.world_size
    call = CallDescription("all_gather_single", dtype_name(caller.dtype), tuple(caller.shape), dim=dim)
    return _gathering(caller, call, sizes)


def _all_gatherv(caller: Caller, sizes: Sequence[int], dim: int) -> Job:
    dim = check_dim("all_gatherv", caller.shape, dim)
    sizes = check_sizes("sizes of all_gatherv", sizes, caller.world_size)
    if caller.shape[dim] != sizes[caller.rank]:
        raise ConfigError(
            f"all_gatherv: sizes={list(sizes)} gives rank {caller.rank} {sizes[caller.rank]} rows, "
            f"its tensor has {caller.shape[dim]} along dim {dim}"
        )
    shape = tuple(_replaced(caller.shape, dim, sum(sizes)))
    call = CallDescription("all_gatherv", dtype_name(caller.dtype), shape, dim=dim, sizes=sizes)
    return _gathering(caller, call, sizes)


def _gather(caller: Caller, root: int, dim: int) -> Job:
    root = check_rank("gather", "root", root, caller.world_size)
    dim = check_dim("gather", caller.shape, dim)
    sizes = (caller.shape[dim],) * caller.world_size
    call = CallDescription("gather", dtype_name(caller.dtype), tuple(caller.shape), root=root, dim=dim)
    return _gathering(caller, call, sizes)


def _gathering(caller: Caller, call: CallDescription, sizes: Sequence[int]) -> Job:
    """Whole tensors, of `sizes[s]` rows along `call.dim`, to the root or to all."""
    row = math.prod(caller.shape[: call.dim]) * math.prod(caller.shape[call.dim + 1 :])
    whole = _replaced(caller.shape, call.dim, sum(sizes))
    parts = gather_parts([size * row for size in sizes], caller.rank, call.root)
    gets = call.root in (-1, caller.rank)
    chunks = Chunks(tuple(whole), call.dim, tuple(sizes))
    return Job(
        call,
        caller.dtype,
        _nbytes(whole.numel(), caller.dtype),
        whole if gets else None,
        parts,
        unpacks=_unless_flat(chunks) if gets else None,
    )


def _scatter(caller: Caller, root: int, dim: int) -> Job:
    root = check_rank("scatter", "root", root, caller.world_size)
    dim = check_dim("scatter", caller.shape, dim)
    sizes = _equal("scatter", caller, dim)
    call = CallDescription("scatter", dtype_name(caller.dtype), tuple(caller.shape), root=root, dim=dim)
    return _scattering(caller, call, sizes)


def _reduce_scatter_single(caller: Caller, op: object, dim: int) -> Job:
    dim = check_dim("reduce_scatter_single", caller.shape, dim)
    reduce = _reduction(op, caller.dtype)
    sizes = _equal("reduce_scatter_single", caller, dim)
    call = CallDescription(
        "reduce_scatter_single", dtype_name(caller.dtype), tuple(caller.shape), reduce, dim=dim
    )
    return _scattering(caller, call, sizes)


def _reduce_scatterv(caller: Caller, sizes: Sequence[int], op: object, dim: int) -> Job:
    dim = check_dim("reduce_scatterv", caller.shape, dim)
    reduce = _reduction(op, caller.dtype)
    sizes = check_sizes("sizes of reduce_scatterv", sizes, caller.world_size)
    if caller.shape[dim] != sum(sizes):
        raise ConfigError(
            f"reduce_scatterv: sizes={list(sizes)} adds up to {sum(sizes)}, the tensor has "
            f"{caller.shape[dim]} along dim {dim}"
        )
    call = CallDescription(
        "reduce_scatterv", dtype_name(caller.dtype), tuple(caller.shape), reduce, dim=dim, sizes=sizes
    )
    return _scattering(caller, call, sizes)


def _equal(verb: str, caller: Caller, dim: int) -> tuple[int, ...]:
    length = caller.shape[dim]
    if length % caller.world_size:
        raise ConfigError(
            f"{verb} of {list(caller.shape)}: {length} along dim {dim} does not divide by "
            f"{caller.world_size} ranks; nothing is padded, so pad it or give sizes to the variable form"
        )
    return (length // caller.world_size,) * caller.world_size


def _scattering(caller: Caller, call: CallDescription, sizes: Sequence[int]) -> Job:
    """Parts of `sizes[d]` rows along `call.dim` of the root's tensor, or of the reduction of all."""
    row = math.prod(caller.shape[: call.dim]) * math.prod(caller.shape[call.dim + 1 :])
    parts = scatter_parts([size * row for size in sizes], caller.rank, call.root)
    chunks = Chunks(tuple(caller.shape), call.dim, tuple(sizes))
    gives = call.root in (-1, caller.rank)
    return Job(
        call,
        caller.dtype,
        _nbytes(caller.shape.numel(), caller.dtype),
        _replaced(caller.shape, call.dim, sizes[caller.rank]),
        parts,
        packs=_unless_flat(chunks) if gives else None,
    )


def _all_to_all_single(caller: Caller) -> Job:
    if not caller.shape:
        raise ConfigError("all_to_all_single of a 0-d tensor has no rows; reshape(1)")
    if caller.shape[0] % caller.world_size:
        raise ConfigError(
            f"{caller.shape[0]} rows do not divide among {caller.world_size} ranks; give send_splits="
        )
    call = CallDescription("all_to_all_single", dtype_name(caller.dtype), tuple(caller.shape))
    numel = caller.shape.numel()
    counts = [[numel // caller.world_size] * caller.world_size] * caller.world_size
    parts = exchange_parts(counts, caller.rank)
    return Job(call, caller.dtype, _nbytes(numel, caller.dtype), caller.shape, parts)


def _all_to_all_ragged(caller: Caller, counts: tuple[tuple[int, ...], ...]) -> Job:
    """Rank `s` gives `counts[s][d]` rows to `d`; all ranks know all counts."""
    row = math.prod(caller.shape[1:])
    call = CallDescription(
        "all_to_all_single",
        dtype_name(caller.dtype),
        tuple(caller.shape[1:]),
        sizes=tuple(count for line in counts for count in line),
    )
    parts = exchange_parts([[count * row for count in line] for line in counts], caller.rank)
    largest = max(sum(line) for line in counts) * row
    rows = sum(line[caller.rank] for line in counts)
    return Job(call, caller.dtype, _nbytes(largest, caller.dtype), _replaced(caller.shape, 0, rows), parts)


def _barrier(caller: Caller) -> Job:
    return Job(CallDescription("barrier"), caller.dtype, 0, caller.shape)


JOBS: dict[str, Callable[..., Job]] = {
    "all_reduce": _all_reduce,
    "broadcast": _broadcast,
    "reduce": _reduce,
    "all_gather_single": _all_gather_single,
    "all_gatherv": _all_gatherv,
    "gather": _gather,
    "scatter": _scatter,
    "reduce_scatter_single": _reduce_scatter_single,
    "reduce_scatterv": _reduce_scatterv,
    "all_to_all_single": _all_to_all_single,
    "all_to_all_ragged": _all_to_all_ragged,
    "barrier": _barrier,
}
"""How each verb becomes a job: takes a `Caller` and the verb's own arguments; raises ConfigError."""
