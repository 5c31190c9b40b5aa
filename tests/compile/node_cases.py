"""Kernels that work over several nodes: compiled without NVSHMEM up to PTX, and with it to the end."""

import contextlib
import dataclasses
import functools
import io
from unittest import mock

import triton
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource

from tcomm.algorithms import acc_dtype
from tcomm.kernels.launch import COMPILED_THREADS, tile_numel
from tcomm.kernels.nodes import NODES_MAX_REGISTERS, reduce_regions
from tcomm.memory.layout import ALIGNMENT, StagingLayout
from tests.compile.cases import ACCUMULATORS, DTYPES, PARAMETERS, STAGING_BYTES, TARGETS, discovered_kernels

NODE_PARAMETERS = PARAMETERS | {"part_stride": "i64", "pes_ptr": "*i64"}


@dataclasses.dataclass(frozen=True)
class Stages:
    """What the assembly of a kernel has to show."""

    publishes: int
    """Stores of arrival words, to ranks of this node."""
    waits: int
    """For words: of this node, or of other nodes."""
    spans: int
    """Loops over tiles that load and store."""


STAGES = {
    "_hierarchical_all_gather_kernel": Stages(publishes=1, waits=2, spans=2),
    "_hierarchical_all_reduce_kernel": Stages(publishes=2, waits=3, spans=4),
}
NODE_KERNELS = tuple(STAGES)


@dataclasses.dataclass(frozen=True)
class NodeCase:
    kernel: str
    target: str
    dtype: str
    world_size: int
    nodes: int
    op: str = ""

    def __str__(self):
        name = self.kernel.removeprefix("_hierarchical_").removesuffix("_kernel")
        return f"{self.target}-{name}-{self.dtype}-{self.nodes}x{self.world_size // self.nodes}-{self.op}"

    @property
    def stages(self):
        return STAGES[self.kernel]


CUDA_TARGETS = tuple(name for name, target in TARGETS.items() if target.backend == "cuda")


def _cases():
    gather, reduce = NODE_KERNELS
    for target in CUDA_TARGETS:
        yield NodeCase(gather, target, "i32", 8, 2)
        yield NodeCase(reduce, target, "bf16", 8, 2, "sum")
    yield NodeCase(gather, "sm_90", "u8", 3, 3)
    yield NodeCase(reduce, "sm_90", "fp32", 16, 2, "avg")
    yield NodeCase(reduce, "sm_90", "fp64", 6, 3, "min")
    yield NodeCase(reduce, "sm_100", "fp16", 4, 4, "max")


NODE_CASES = tuple(_cases())


def constants_of(case):
    dtype = DTYPES[case.dtype]
    acc = acc_dtype(dtype)
    layout, local = StagingLayout(STAGING_BYTES, case.world_size), case.world_size // case.nodes
    capacity, rail_bytes = reduce_regions(
        layout.half_bytes, case.nodes, local, acc.itemsize // dtype.itemsize or 1
    )
    return {
        "WORLD": case.world_size,
        "LANES": triton.next_power_of_2(case.world_size),
        "LANE_HALF_BYTES": layout.lane_half_bytes,
        "ATOMIC_POLL": False,
        "NODES": case.nodes,
        "HALF_BYTES": layout.half_bytes,
        "SLOT_BYTES": layout.half_bytes // case.nodes // ALIGNMENT * ALIGNMENT,
        "RAIL_OFFSET": capacity,
        "RAIL_BYTES": rail_bytes,
        "UNIT": ALIGNMENT // dtype.itemsize,
        "STRIDE_UNIT": 16 // dtype.itemsize,
        "BLOCK": tile_numel(dtype.itemsize),
        "OP": case.op,
        "ACC": ACCUMULATORS.get(acc),
    }


def parameters_of(case):
    """Names of the kernel's run-time arguments, in order."""
    return [name for name in discovered_kernels()[case.kernel].arg_names if name in NODE_PARAMETERS]


def compile_with(fn, target, dtype, constants, bitcode=None, max_registers=NODES_MAX_REGISTERS):
    """Compile `fn`; up to PTX with its calls unresolved where there is no bitcode to link.

    Returns:
        The kernel, and what ptxas says of it.
    """
    names = fn.arg_names
    signature = {name: NODE_PARAMETERS.get(name, "constexpr").format(dtype=dtype) for name in names}
    pointers = [name for name in names if signature[name].startswith("*")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    values = {(names.index(name),): value for name, value in constants.items() if name in names}
    options = {"num_warps": COMPILED_THREADS // 32, "maxnreg": max_registers}
    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        if bitcode is None:
            stack.enter_context(mock.patch.object(CUDABackend, "make_cubin", return_value=b""))
        else:
            options["extern_libs"] = {"libnvshmem_device": str(bitcode)}
            stack.enter_context(mock.patch.object(triton.knobs.nvidia, "dump_ptxas_log", True))
            stack.enter_context(contextlib.redirect_stdout(said))
        source = ASTSource(fn, signature, values, attributes)
        kernel = triton.compile(source, target=TARGETS[target], options=options)
    return kernel, said.getvalue()


@functools.cache
def unlinked(case):
    """The PTX of a case, its calls of NVSHMEM unresolved."""
    fn = discovered_kernels()[case.kernel]
    kernel, _ = compile_with(fn, case.target, case.dtype, constants_of(case))
    return kernel.asm["ptx"]
