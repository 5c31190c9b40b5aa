"""Loops over the tiles of a span behind a multicast address, 16 bytes a thread and access.

As in `tiles.py`, a span's tile `t` belongs to program `t % num_programs` on every rank, so that what a
program waits for is the work of the same program of its peers. A multimem access is always of 16 bytes. So
what is staged is filled up with zeros to a multiple of that; what is added up behind the last element is
dropped.

Multicast addresses are 64-bit numbers, and multiples of 16.
"""

import triton
import triton.language as tl

from tcomm.kernels.device_cuda import multimem_load_sum, multimem_store
from tcomm.kernels.tiles import copy_span

__all__ = ["multicast_span", "restage_sums", "stage_span", "sum_span"]


@triton.jit
def stage_span(src_ptr, dst_ptr, numel, BLOCK: tl.constexpr):
    """dst[i] = src[i] for i < numel, by ordinary stores; zeros behind, up to a multiple of 16 bytes.

    Example: 5 elements of bf16 -> 5 elements and 3 zeros.
    """
    dtype = dst_ptr.dtype.element_ty
    VECTOR: tl.constexpr = 128 // dtype.primitive_bitwidth
    copy_span(src_ptr, dst_ptr, numel, BLOCK)
    if (numel % VECTOR != 0) & ((numel // BLOCK) % tl.num_programs(0) == tl.program_id(0)):
        offs = numel // VECTOR * VECTOR + tl.arange(0, VECTOR)
        tl.store(dst_ptr + offs, tl.zeros((VECTOR,), dtype), mask=offs >= numel)


@triton.jit
def sum_span(address, dst_ptr, numel, WORLD: tl.constexpr, BLOCK: tl.constexpr, OP: tl.constexpr):
    """dst[i] = sum or average over ranks of what lies at the multicast address, for i < numel."""
    tile = tl.program_id(0).to(tl.int64)
    while tile < numel // BLOCK:
        _sum_tile(address, dst_ptr, numel, tile, WORLD, BLOCK, OP, True)
        tile += tl.num_programs(0)
    if (tile == numel // BLOCK) & (numel % BLOCK != 0):
        _sum_tile(address, dst_ptr, numel, tile, WORLD, BLOCK, OP, False)


@triton.jit
def _sum_tile(
    address, dst_ptr, numel, tile,
    WORLD: tl.constexpr, BLOCK: tl.constexpr, OP: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    dtype = dst_ptr.dtype.element_ty
    vectors, some = _vectors(address, numel, tile, dtype, BLOCK)
    a, b, c, d = _summed(vectors, some, dtype, WORLD, OP, FULL)
    offs = tile * BLOCK + tl.arange(0, BLOCK)
    if FULL:
        tl.store(dst_ptr + offs, _elements(a, b, c, d, dtype, BLOCK))
    else:
        tl.store(dst_ptr + offs, _elements(a, b, c, d, dtype, BLOCK), mask=offs < numel)


@triton.jit
def restage_sums(
    address, numel,
    dtype: tl.constexpr, WORLD: tl.constexpr, BLOCK: tl.constexpr, OP: tl.constexpr,
):  # fmt: skip
    """Replace what lies at the multicast address, on every rank, by its sum or average over ranks.

    Each thread stores to all what it alone has loaded from all; nothing else orders the two.
    """
    tile = tl.program_id(0).to(tl.int64)
    while tile < numel // BLOCK:
        _restage_tile(address, numel, tile, dtype, WORLD, BLOCK, OP, True)
        tile += tl.num_programs(0)
    if (tile == numel // BLOCK) & (numel % BLOCK != 0):
        _restage_tile(address, numel, tile, dtype, WORLD, BLOCK, OP, False)


@triton.jit
def _restage_tile(
    address, numel, tile,
    dtype: tl.constexpr, WORLD: tl.constexpr, BLOCK: tl.constexpr, OP: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    vectors, some = _vectors(address, numel, tile, dtype, BLOCK)
    a, b, c, d = _summed(vectors, some, dtype, WORLD, OP, FULL)
    multimem_store(vectors, some, a, b, c, d, FULL)


@triton.jit
def multicast_span(src_ptr, address, numel, BLOCK: tl.constexpr):
    """Store src[i] for i < numel behind the multicast address; zeros behind, up to 16 bytes.

    Elements are words of 8, 16 or 32 bits.
    """
    tile = tl.program_id(0).to(tl.int64)
    while tile < numel // BLOCK:
        _multicast_tile(src_ptr, address, numel, tile, BLOCK, True)
        tile += tl.num_programs(0)
    if (tile == numel // BLOCK) & (numel % BLOCK != 0):
        _multicast_tile(src_ptr, address, numel, tile, BLOCK, False)


@triton.jit
def _multicast_tile(src_ptr, address, numel, tile, BLOCK: tl.constexpr, FULL: tl.constexpr):
    vectors, some = _vectors(address, numel, tile, src_ptr.dtype.element_ty, BLOCK)
    offs = tile * BLOCK + tl.arange(0, BLOCK)
    if FULL:
        value = tl.load(src_ptr + offs)
    else:
        value = tl.load(src_ptr + offs, mask=offs < numel, other=0)
    a, b, c, d = _words(value, BLOCK)
    multimem_store(vectors, some, a, b, c, d, FULL)


@triton.jit
def _vectors(address, numel, tile, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """Addresses of a tile's 16-byte vectors, and in which of them an element lies."""
    VECTOR: tl.constexpr = 128 // dtype.primitive_bitwidth
    first = tile * BLOCK + tl.arange(0, BLOCK // VECTOR) * VECTOR
    return address + first * (16 // VECTOR), first < numel


@triton.jit
def _summed(vectors, some, dtype: tl.constexpr, WORLD: tl.constexpr, OP: tl.constexpr, FULL: tl.constexpr):
    """Four words of each vector, summed over ranks; times fp32(1/W) for an average."""
    a, b, c, d = multimem_load_sum(vectors, some, dtype, FULL)
    if OP == "avg":
        tl.static_assert(dtype == tl.float32)
        return (
            _scaled(a, 1.0 / WORLD),
            _scaled(b, 1.0 / WORLD),
            _scaled(c, 1.0 / WORLD),
            _scaled(d, 1.0 / WORLD),
        )
    else:
        return a, b, c, d


@triton.jit
def _scaled(word, factor: tl.constexpr):
    return (word.to(tl.float32, bitcast=True) * factor).to(tl.int32, bitcast=True)


@triton.jit
def _elements(a, b, c, d, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """The elements of the words a, b, c, d of each vector, in order. All stays in its thread."""
    words = tl.join(tl.join(a, c), tl.join(b, d))
    if dtype.primitive_bitwidth == 32:
        return tl.reshape(words, (BLOCK,)).to(dtype, bitcast=True)
    else:
        words = tl.reshape(words, (BLOCK // 2,))
        low = words.to(tl.int16).to(dtype, bitcast=True)
        high = (words >> 16).to(tl.int16).to(dtype, bitcast=True)
        return tl.reshape(tl.join(low, high), (BLOCK,))


@triton.jit
def _words(value, BLOCK: tl.constexpr):
    """The four words of each 16 bytes of value. All stays in its thread."""
    VECTORS: tl.constexpr = BLOCK * value.dtype.primitive_bitwidth // 128
    if value.dtype.primitive_bitwidth == 8:
        even, odd = tl.split(tl.reshape(value.to(tl.uint8, bitcast=True).to(tl.int32), (BLOCK // 2, 2)))
        low, high = tl.split(tl.reshape(even | (odd << 8), (BLOCK // 4, 2)))
        words = low | (high << 16)
    elif value.dtype.primitive_bitwidth == 16:
        low, high = tl.split(tl.reshape(value.to(tl.uint16, bitcast=True).to(tl.int32), (BLOCK // 2, 2)))
        words = low | (high << 16)
    else:
        words = value.to(tl.int32, bitcast=True)
    ac, bd = tl.split(tl.reshape(words, (VECTORS, 2, 2)))
    a, c = tl.split(ac)
    b, d = tl.split(bd)
    return a, b, c, d
