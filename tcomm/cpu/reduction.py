"""Reducing the ranks' values in rank order on a CPU: the kernels' bits, at memory speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tcomm.algorithms import acc_dtype, combine_of

__all__ = ["Reduction", "make_reduction"]

Reduction = Callable[[Sequence[torch.Tensor], torch.Tensor], object]
"""Takes one tensor per rank, in rank order, and where the result goes. All of one shape."""

_CHUNK_BYTES = 128 * 1024


def make_reduction(op: str, dtype: torch.dtype, world_size: int, numel: int) -> Reduction:
    """The fastest way to reduce tensors of `numel` elements with the bits that the kernels give.

    fp16 and bf16 are summed in fp32 and rounded once. Two ranks need no accumulator: torch itself adds two
    16-bit values in fp32 and rounds once. Long tensors go in chunks that stay in a core's cache.

    The destination may be the first source, or the second of two; no other.
    """
    combine = combine_of(op)
    widens = acc_dtype(dtype) != dtype and op in {"sum", "avg"} and (world_size > 2 or op == "avg")
    if widens:
        return _widening(op, world_size, numel)
    if world_size == 1:
        return lambda sources, out: out.copy_(sources[0])
    if world_size == 2 and op != "avg":
        return lambda sources, out: combine(sources[0], sources[1], out=out)
    scale = 1.0 / world_size if op == "avg" else None

    def reduce_chunk(sources: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        combine(sources[0], sources[1], out=out)
        for source in sources[2:]:
            combine(out, source, out=out)
        if scale is not None:
            out.mul_(scale)

    return _in_chunks(reduce_chunk, numel, _CHUNK_BYTES // dtype.itemsize)


def _widening(op: str, world_size: int, numel: int) -> Reduction:
    step = _CHUNK_BYTES // torch.float32.itemsize
    scratch = torch.empty(min(numel, step), dtype=torch.float32, device="cpu")

    def reduce_chunk(sources: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        acc = scratch[: out.numel()].view(out.shape)
        acc.copy_(sources[0])
        for source in sources[1:]:
            acc.add_(source)
        if op == "avg":
            acc.mul_(1.0 / world_size)
        out.copy_(acc)

    return _in_chunks(reduce_chunk, numel, step)


def _in_chunks(reduce_chunk: Reduction, numel: int, step: int) -> Reduction:
    if numel <= step:
        return reduce_chunk

    def reduce_all(sources: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        parts = [source.view(-1).split(step) for source in sources]
        for index, piece in enumerate(out.view(-1).split(step)):
            reduce_chunk([part[index] for part in parts], piece)

    return reduce_all
