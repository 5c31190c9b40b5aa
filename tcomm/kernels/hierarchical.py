"""All-gather and all-reduce over several nodes: loads and stores inside a node, NVSHMEM puts between nodes.

============  =======================  ==============================  ======
collective    bytes a rank sends       bytes a rank loads              rounds
============  =======================  ==============================  ======
all_gather    (N - 1) messages         W messages                      2
all_reduce    (N - 1) / L messages *   2 (L - 1) / L messages          3
============  =======================  ==============================  ======

N nodes of L ranks, W = N * L; rank r is at place r % L of node r // L; its rail is that place of all nodes.
* in the accumulator's type: twice that for 16-bit elements.

Needs: N of at least 2, which divides W; control pages and staging in NVSHMEM's symmetric memory; x and out
contiguous. A node may also be half of a machine: nothing but puts passes between nodes.

Numerics: fp32, fp16 and bf16 are accumulated in fp32: in rank order inside a node, those sums in node order,
and rounded once at the end, to nearest even. The same bits on all ranks; not those of the algorithms of one
node, which add in rank order throughout.

Source: the rails of NCCL's and DeepEP's inter-node paths, with put-with-signal as in NVSHMEM's own examples.

Meaning: `tcomm.reference.all_gather`, and `all_reduce` up to the order of additions.
Contract: `docs/memory-model.md`, section 10.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from tcomm.algorithms import GPU_ALGORITHMS
from tcomm.errors import ConfigError
from tcomm.kernels.bound import compiling_only
from tcomm.kernels.device import (
    await_some,
    begin_call,
    finish_call,
    launched_rank,
    page_of,
    pointer_to,
    publish_to_some,
)
from tcomm.kernels.launch import grid_of, narrow_tile_of, staging_of
from tcomm.kernels.nodes import launch_on_nodes, reduce_regions
from tcomm.kernels.numerics import accumulator_of, check_reduction
from tcomm.kernels.partition import as_flat_words
from tcomm.kernels.rails import await_rails, mates_of, send_on_rails, spoiled_unless, worse
from tcomm.kernels.runs import copy_run, reduce_run
from tcomm.memory.base import KernelArena
from tcomm.memory.control import ErrorKind
from tcomm.memory.layout import ALIGNMENT, cut
from tcomm.signature import CallDescription

__all__ = ["compile_nodes_ahead", "hierarchical_all_gather", "hierarchical_all_reduce"]

_RUNTIME = ["rank", "signature", "budget", "numel"]
_TIMEOUT = tl.constexpr(int(ErrorKind.TIMEOUT))


@triton.jit
def _run_of(first, length, numel, UNIT: tl.constexpr):
    """First element and number of elements of this program's part of `length` elements from `first` on."""
    share = tl.cdiv(tl.cdiv(length, tl.num_programs(0)), UNIT) * UNIT
    begin = tl.program_id(0).to(tl.int64) * share
    count = tl.minimum(tl.minimum(share, length - begin), numel - first - begin)
    return first + begin, tl.maximum(count, 0)


@triton.jit(do_not_specialize=[*_RUNTIME, "part_stride"])
def _hierarchical_all_gather_kernel(
    x_ptr, out_ptr,  # [numel]; W parts, `part_stride` apart
    numel, part_stride: tl.int64, staging_ptrs, pad_ptrs,  # [W] int64, 0 for ranks of other nodes
    pes_ptr,  # [W] int64, PE of each rank
    signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    NODES: tl.constexpr, HALF_BYTES: tl.constexpr, SLOT_BYTES: tl.constexpr, UNIT: tl.constexpr,
    STRIDE_UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every rank puts x into its node's slot along its rail, then collects all slots of its mates.

    Example: N=2, L=2, x_r=[r] -> after the rails ranks 0 and 2 hold [0] [2], ranks 1 and 3 hold [1] [3]
    -> out=[0, 1, 2, 3].
    """
    rank = launched_rank(rank)
    LOCAL: tl.constexpr = WORLD // NODES
    page = page_of(pad_ptrs, rank)
    word = begin_call(page, pointer_to(staging_ptrs, rank, 0, tl.int64), signature, LANE_HALF_BYTES // 8)
    half = 2 * LANE_HALF_BYTES + ((word >> 32) & 1) * HALF_BYTES
    dtype = x_ptr.dtype.element_ty
    first, count = _run_of(0, numel, numel, UNIT)

    offset = half + rank // LOCAL * SLOT_BYTES + first * (dtype.primitive_bitwidth // 8)
    copy_run(x_ptr + first, pointer_to(staging_ptrs, rank, offset, dtype), count, BLOCK)
    address = tl.load(staging_ptrs + rank) + offset
    nbytes = count * (dtype.primitive_bitwidth // 8)
    send_on_rails(address, nbytes, pad_ptrs, pes_ptr, rank, word, word, WORLD, NODES)
    kind = await_rails(page, pad_ptrs, rank, word, budget, WORLD, LANES, NODES, ATOMIC_POLL)
    if kind != _TIMEOUT:
        mates = mates_of(rank, LOCAL)
        publish_to_some(pad_ptrs, rank, mates, 1, spoiled_unless(kind == 0, word), LANES)
        kind = worse(kind, await_some(page, mates, 1, word, budget, LANES, ATOMIC_POLL))
        if kind == 0:
            for step in tl.static_range(WORLD):
                source = (rank + step) % WORLD
                mate = rank // LOCAL * LOCAL + source % LOCAL
                slot = half + source // LOCAL * SLOT_BYTES
                src_ptr = pointer_to(staging_ptrs, mate, slot, dtype)
                begin = tl.multiple_of(source * part_stride, STRIDE_UNIT)
                copy_run(src_ptr + first, out_ptr + begin + first, count, BLOCK)
    finish_call(page, word)


def hierarchical_all_gather(
    x: torch.Tensor,
    arena: KernelArena,
    nodes: int,
    *,
    out: torch.Tensor | None = None,
    pes: Sequence[int] | None = None,
    timeout: float | None = 120.0,
    call: CallDescription | None = None,
) -> torch.Tensor:
    """Put the x of all ranks one after another, over several nodes. **Collective.**

    Args:
        x: [...], contiguous, of one shape and dtype on all ranks; any dtype.
        arena: of the group, with staging. A message longer than a slot goes in several pieces.
        nodes: how many; each has the next `world_size / nodes` ranks.
        out: [W, *x.shape], contiguous, of the dtype of x.
        pes: NVSHMEM's number of each rank; the rank itself where None.
        timeout: seconds that each piece may wait; None: while the peers live.
        call: what the ranks compare; made from the arguments where None.

    Returns:
        `out`, or a new tensor.

    Raises:
        ConfigError: on this rank only, when an argument is wrong; nothing was sent.
        CapabilityError: when there is no staging, or nothing to run a kernel on.
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
    """
    world = arena.world_size
    _check_nodes(world, nodes)
    shape = (world, *x.shape)
    out = x.new_empty(shape) if out is None else out
    _check_out(x, out, shape)
    layout = staging_of(arena).layout
    slot_bytes = layout.half_bytes // nodes // ALIGNMENT * ALIGNMENT
    call = call or _describe("all_gather", x, nodes)
    words, out_words = as_flat_words(x), as_flat_words(out)
    size, total = words.itemsize, words.numel()
    vector = 16 // size
    for start, numel in cut(total, size, slot_bytes):
        tile = narrow_tile_of(size, numel)
        launch_on_nodes(
            _hierarchical_all_gather_kernel, grid_of(triton.cdiv(numel, tile)), arena, nodes, pes, call,
            timeout,
            words[start : start + numel], out_words[start:], numel, total,
            HALF_BYTES=layout.half_bytes, SLOT_BYTES=slot_bytes, UNIT=ALIGNMENT // size,
            STRIDE_UNIT=vector if total % vector == 0 else 1, BLOCK=tile,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=_RUNTIME)
def _hierarchical_all_reduce_kernel(
    x_ptr, out_ptr,  # [numel]
    numel, staging_ptrs, pad_ptrs,  # [W] int64, 0 for ranks of other nodes
    pes_ptr,  # [W] int64, PE of each rank
    signature: tl.int64, rank, budget: tl.int64,
    WORLD: tl.constexpr, LANES: tl.constexpr, LANE_HALF_BYTES: tl.constexpr, ATOMIC_POLL: tl.constexpr,
    NODES: tl.constexpr, HALF_BYTES: tl.constexpr, RAIL_OFFSET: tl.constexpr, RAIL_BYTES: tl.constexpr,
    UNIT: tl.constexpr, BLOCK: tl.constexpr, OP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reduce a slice per place inside every node, exchange the sums on rails, add them, collect all slices.

    Example (UNIT=1): N=2, L=2, x_r=[10**r, 2 * 10**r] -> slice sums [11] [22] on node 0, [1100] [2200] on
    node 1 -> after the rails ranks 0 and 2 have [1111], ranks 1 and 3 [2222] -> [1111, 2222].
    """
    rank = launched_rank(rank)
    LOCAL: tl.constexpr = WORLD // NODES
    PARTIAL: tl.constexpr = "sum" if OP == "avg" else OP
    DIVISOR: tl.constexpr = WORLD if OP == "avg" else 1
    page = page_of(pad_ptrs, rank)
    word = begin_call(page, pointer_to(staging_ptrs, rank, 0, tl.int64), signature, LANE_HALF_BYTES // 8)
    half = 2 * LANE_HALF_BYTES + ((word >> 32) & 1) * HALF_BYTES
    dtype = x_ptr.dtype.element_ty
    length = tl.cdiv(tl.cdiv(numel, LOCAL), UNIT).to(tl.int64) * UNIT
    mates = mates_of(rank, LOCAL)
    mine = rank % LOCAL * length
    first, count = _run_of(mine, length, numel, UNIT)
    own_ptr = pointer_to(staging_ptrs, rank, half, dtype)

    for step in tl.static_range(LOCAL):
        begin, some = _run_of((rank + step) % LOCAL * length, length, numel, UNIT)
        copy_run(x_ptr + begin, own_ptr + begin, some, BLOCK)
    publish_to_some(pad_ptrs, rank, mates, 0, word, LANES)
    kind = await_some(page, mates, 0, word, budget, LANES, ATOMIC_POLL)
    slots = half + RAIL_OFFSET + (first - mine) * (ACC.primitive_bitwidth // 8)
    slot = slots + rank // LOCAL * RAIL_BYTES
    if kind == 0:
        reduce_run(
            pointer_to(staging_ptrs, rank, slot, ACC), staging_ptrs, rank // LOCAL * LOCAL,
            half + first * (dtype.primitive_bitwidth // 8), count, dtype,
            LOCAL, 1, BLOCK, PARTIAL, ACC, 1, 0,
        )  # fmt: skip
    if kind != _TIMEOUT:
        nbytes = tl.where(kind == 0, count * (ACC.primitive_bitwidth // 8), 0)
        address, told = tl.load(staging_ptrs + rank) + slot, spoiled_unless(kind == 0, word)
        send_on_rails(address, nbytes, pad_ptrs, pes_ptr, rank, word, told, WORLD, NODES)
        kind = worse(kind, await_rails(page, pad_ptrs, rank, word, budget, WORLD, LANES, NODES, ATOMIC_POLL))
    if kind == 0:
        reduce_run(
            own_ptr + first, staging_ptrs, rank, slots, count, ACC,
            NODES, DIVISOR, BLOCK, PARTIAL, ACC, 0, RAIL_BYTES,
        )  # fmt: skip
    if kind != _TIMEOUT:
        publish_to_some(pad_ptrs, rank, mates, 1, spoiled_unless(kind == 0, word), LANES)
        kind = worse(kind, await_some(page, mates, 1, word, budget, LANES, ATOMIC_POLL))
    if kind == 0:
        for step in tl.static_range(LOCAL):
            place = (rank + step) % LOCAL
            begin, some = _run_of(place * length, length, numel, UNIT)
            src_ptr = pointer_to(staging_ptrs, rank // LOCAL * LOCAL + place, half, dtype)
            copy_run(src_ptr + begin, out_ptr + begin, some, BLOCK)
    finish_call(page, word)


def hierarchical_all_reduce(
    x: torch.Tensor,
    arena: KernelArena,
    nodes: int,
    op: str = "sum",
    *,
    out: torch.Tensor | None = None,
    pes: Sequence[int] | None = None,
    timeout: float | None = 120.0,
    call: CallDescription | None = None,
) -> torch.Tensor:
    """Reduce x over the ranks of several nodes; a slice per place crosses the network. **Collective.**

    Args:
        x: [...], contiguous; float32, float16, bfloat16, float64, int32 or int64.
        arena: of the group, with staging. A long message goes in several pieces.
        nodes: how many; each has the next `world_size / nodes` ranks.
        op: `sum`, `avg` (floating point only), `max` or `min`.
        out: like x; may be x.
        pes: NVSHMEM's number of each rank; the rank itself where None.
        timeout: seconds that each piece may wait; None: while the peers live.
        call: what the ranks compare; made from the arguments where None.

    Returns:
        `out`, or a new tensor.

    Raises:
        ConfigError: on this rank only, when an argument is wrong; nothing was sent.
        CapabilityError: when there is no staging, or nothing to run a kernel on.
        CollectiveMismatchError, PeerLostError, PeerTimeoutError: from the wait.
    """
    world = arena.world_size
    _check_nodes(world, nodes)
    check_reduction(x.dtype, op)
    out = torch.empty_like(x) if out is None else out
    _check_out(x, out, tuple(x.shape))
    acc = accumulator_of(x.dtype)
    layout = staging_of(arena).layout
    capacity, rail_bytes = reduce_regions(
        layout.half_bytes, nodes, world // nodes, acc.primitive_bitwidth // 8 // x.itemsize
    )
    call = call or _describe("all_reduce", x, nodes, op)
    flat_x, flat_out = x.view(-1), out.view(-1)
    for start, numel in cut(x.numel(), x.itemsize, capacity):
        slice_numel = triton.cdiv(numel, world // nodes)
        tile = narrow_tile_of(x.itemsize, slice_numel)
        num_blocks = grid_of(triton.cdiv(slice_numel, tile))
        launch_on_nodes(
            _hierarchical_all_reduce_kernel, num_blocks, arena, nodes, pes, call, timeout,
            flat_x[start : start + numel], flat_out[start : start + numel], numel,
            HALF_BYTES=layout.half_bytes, RAIL_OFFSET=capacity, RAIL_BYTES=rail_bytes,
            UNIT=ALIGNMENT // x.itemsize, BLOCK=tile, OP=op, ACC=acc,
        )  # fmt: skip
    return out


def compile_nodes_ahead(
    arena: KernelArena, nodes: int, pes: Sequence[int], dtypes: Sequence[torch.dtype], ops: Sequence[str]
) -> None:
    """`warmup.compile_ahead` of what works over several nodes: compile and load, and launch nothing.

    Args:
        arena: of the group, with staging.
        nodes: how many.
        pes: NVSHMEM's number of each rank.
        dtypes: element types; what cannot be reduced is only moved.
        ops: reduce operations.

    Raises:
        CapabilityError: while a graph is captured.
    """
    known = {algorithm.name: algorithm for algorithm in GPU_ALGORITHMS["all_reduce"]}["triton:hierarchical"]
    world, numel, device = arena.world_size, ALIGNMENT, staging_of(arena).buffer.table.device
    with compiling_only():
        for dtype in dtypes:
            x = torch.zeros(world, numel, dtype=dtype, device=device)
            # Parts of whole vectors, and parts that begin anywhere.
            for out in (x, x.view(-1)[:world].view(world, 1)):
                hierarchical_all_gather(out[0], arena, nodes, out=out, pes=pes)
            for op in ops:
                if not known.refusal(op, dtype):
                    hierarchical_all_reduce(x[0], arena, nodes, op, out=x[0], pes=pes)


def _describe(op: str, x: torch.Tensor, nodes: int, reduce: str = "") -> CallDescription:
    name = str(x.dtype).removeprefix("torch.")
    return CallDescription(op, name, tuple(x.shape), reduce, algorithm=f"triton:hierarchical_{nodes}")


def _check_nodes(world_size: int, nodes: int) -> None:
    if nodes < 2 or world_size % nodes:
        raise ConfigError(
            f"{world_size} ranks on {nodes} nodes; give 2 nodes or more with equally many ranks each, or use "
            "an algorithm for one node"
        )


def _check_out(x: torch.Tensor, out: torch.Tensor, shape: tuple[int, ...]) -> None:
    if (out.shape, out.dtype) != (torch.Size(shape), x.dtype):
        raise ConfigError(f"out is {out.dtype} {list(out.shape)}; it must be {x.dtype} {list(shape)}")
    if not (x.is_contiguous() and out.is_contiguous()):
        raise ConfigError("a kernel needs contiguous x and out; call .contiguous() first")
