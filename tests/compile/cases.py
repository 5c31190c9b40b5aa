"""What is compiled: every kernel, with the constants that its launcher gives it."""

import dataclasses
import functools
import importlib
import inspect
import pkgutil

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tcomm import kernels
from tcomm.algorithms import acc_dtype
from tcomm.kernels.bound import COMPILED_MAX_REGISTERS, COMPILED_THREADS
from tcomm.kernels.launch import tile_numel, tile_of
from tcomm.kernels.point_to_point import mailbox_constants
from tcomm.memory.layout import StagingLayout, slice_numel
from tcomm.memory.mailbox import MailboxLayout

STAGING_BYTES = 8 * 1024 * 1024
MAX_REGISTERS = COMPILED_MAX_REGISTERS
"""Two blocks of 256 threads on an SM or CU, whose register files hold 512 x 128 of them or more.

As `maxnreg` it also keeps ptxas from spilling a few registers of its own accord, to fit a third block.
"""

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
PARAMETERS = {
    "x_ptr": "*{dtype}",
    "out_ptr": "*{dtype}",
    "x_stride": "i32",
    "out_stride": "i32",
    "parts_ptr": "*i64",
    "numel": "i32",
    "part_units": "i64",
    "multicast_ptr": "i64",
    "staging_ptrs": "*i64",
    "pad_ptrs": "*i64",
    "signature": "i64",
    "rank": "i32",
    "budget": "i64",
}
"""Run-time arguments of kernels of collectives and their types."""
UNUSUAL_PARAMETERS = {"parts_ptr", "part_units", "multicast_ptr", "x_stride", "out_stride"}
USUAL_PARAMETERS = tuple(n for n in PARAMETERS if n not in UNUSUAL_PARAMETERS)
"""Those of the kernels of `broken.py`, in order."""
MULTIMEM_PARAMETERS = tuple(n for n in PARAMETERS if n in {*USUAL_PARAMETERS, "multicast_ptr"})
"""Those of the one among them that has multimem accesses."""
MAILBOX_PARAMETERS = {
    "header_ptr": "*i64",
    "nbytes": "i64",
    "mailbox_ptrs": "*i64",
    "peer": "i32",
}
"""Those of send and recv that have other names: in place of out, numel, staging and signature."""

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "u8": torch.uint8,
}
ACCUMULATORS = {torch.float32: tl.float32, torch.float64: tl.float64, torch.int64: tl.int64}

write_back_not_awaited = pytest.mark.xfail(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9),
    reason="LLVM before Triton 3.9 drops the wait after buffer_wbl2 (llvm-project pull request 178316)",
    strict=False,
)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What the assembly of a kernel has to show."""

    phases: int
    lanes: bool = False
    spans: int = 0
    """Loops over tiles: before the first wait and after each; 0 where no data moves."""
    reduces: bool = True
    """Whether it computes; otherwise it moves bare words of any size."""
    sums: bool = False
    """Whether it loads sums from the switch."""
    multicasts: bool = False
    """Whether it stores to all GPUs at once."""

    @property
    def multimem(self):
        """Whether it needs instructions that sm_90 is the first to have."""
        return self.sums or self.multicasts


PROTOCOLS = {
    "_one_shot_push_all_reduce_kernel": Protocol(phases=1, spans=2),
    "_one_shot_pull_all_reduce_kernel": Protocol(phases=1, spans=2),
    "_two_shot_all_reduce_kernel": Protocol(phases=2, spans=3),
    "_one_shot_ll_all_reduce_kernel": Protocol(phases=1, lanes=True),
    "_push_reduce_scatter_kernel": Protocol(phases=1, spans=2),
    "_pull_reduce_scatter_kernel": Protocol(phases=1, spans=2),
    "_push_exchange_kernel": Protocol(phases=1, spans=2, reduces=False),
    "_pull_exchange_kernel": Protocol(phases=1, spans=2, reduces=False),
    "_arrival_barrier_kernel": Protocol(phases=1, reduces=False),
    "_multimem_one_shot_all_reduce_kernel": Protocol(phases=1, spans=2, sums=True),
    "_multimem_two_shot_all_reduce_kernel": Protocol(phases=2, spans=3, sums=True, multicasts=True),
    "_multimem_all_gather_kernel": Protocol(phases=1, spans=2, reduces=False, multicasts=True),
    "_multimem_reduce_scatter_kernel": Protocol(phases=1, spans=2, sums=True),
}


@dataclasses.dataclass(frozen=True)
class Case:
    kernel: str
    target: str
    dtype: str
    world_size: int
    op: str
    aligned: bool = True
    virtual: bool = False
    wide: bool = False

    def __str__(self):
        name = self.kernel.removeprefix("_").removesuffix("_kernel").removesuffix("_all_reduce")
        tail = "" if self.aligned else "-unaligned"
        tail += "-virtual" * self.virtual + "-wide" * self.wide
        return f"{self.target}-{name}-{self.dtype}-{self.world_size}-{self.op}{tail}"

    @property
    def protocol(self):
        return PROTOCOLS[self.kernel]


def _cases():
    for kernel, protocol in PROTOCOLS.items():
        make = _reducing_cases if protocol.reduces else _moving_cases
        yield from _multimem_cases(kernel, protocol) if protocol.multimem else make(kernel, protocol)


def _reducing_cases(kernel, protocol):
    for target in TARGETS:
        yield Case(kernel, target, "bf16", 8, "sum")
        yield Case(kernel, target, "fp32", 3, "max")
    for dtype, world_size, op in (("fp32", 2, "sum"), ("fp32", 8, "avg"), ("fp16", 6, "avg")):
        yield Case(kernel, "sm_90", dtype, world_size, op)
    if not protocol.lanes:
        yield Case(kernel, "sm_90", "fp64", 8, "sum")
        yield Case(kernel, "gfx942", "i64", 3, "min")
        for dtype, world_size, op in (
            ("bf16", 8, "sum"),
            ("fp16", 4, "avg"),
            ("fp32", 2, "max"),
            ("fp64", 3, "sum"),
        ):
            yield Case(kernel, "sm_90", dtype, world_size, op, wide=True)
        yield Case(kernel, "sm_100", "bf16", 5, "sum", wide=True)
    yield Case(kernel, "sm_90", "bf16", 8, "sum", virtual=True)
    yield Case(kernel, "sm_100", "fp32", 3, "max", virtual=True)
    yield Case(kernel, "sm_90", "bf16", 2, "min", aligned=False)
    yield Case(kernel, "gfx942", "bf16", 2, "min", aligned=False)


def _moving_cases(kernel, protocol):
    """`op` says whether all get the same range or each its own."""
    for target in TARGETS:
        yield Case(kernel, target, "i32", 8, "shared")
        if protocol.spans:
            yield Case(kernel, target, "i16", 3, "split")
    if protocol.spans:
        for dtype in ("u8", "i64"):
            yield Case(kernel, "sm_90", dtype, 16, "split")
        yield Case(kernel, "sm_90", "i16", 8, "split", virtual=True)
        yield Case(kernel, "sm_90", "i32", 8, "shared", wide=True)
        yield Case(kernel, "sm_100", "u8", 3, "split", wide=True)
        yield Case(kernel, "sm_90", "i32", 2, "split", aligned=False)
        yield Case(kernel, "gfx942", "i32", 2, "split", aligned=False)


def _multimem_cases(kernel, protocol):
    for target in ("sm_90", "sm_100"):
        if protocol.sums:
            for dtype, world_size, op in (("bf16", 8, "sum"), ("fp32", 3, "avg"), ("fp16", 6, "sum")):
                yield Case(kernel, target, dtype, world_size, op)
            yield Case(kernel, target, "bf16", 2, "sum", aligned=False)
        else:
            for dtype, world_size in (("i32", 8), ("i16", 3), ("u8", 16)):
                yield Case(kernel, target, dtype, world_size, "shared")
            yield Case(kernel, target, "i16", 2, "shared", aligned=False)
    if protocol.sums:
        yield Case(kernel, "sm_90", "fp32", 16, "sum")


CASES = tuple(_cases())


@dataclasses.dataclass(frozen=True)
class MailboxCase:
    """Send or recv in a world, which settles the size of a slot."""

    kernel: str
    target: str
    world_size: int

    def __str__(self):
        return f"{self.target}{self.kernel.removesuffix('_kernel')}-{self.world_size}"


MAILBOX_KERNELS = ("_send_kernel", "_recv_kernel")
MAILBOX_CASES = tuple(
    MailboxCase(kernel, target, world_size)
    for kernel in MAILBOX_KERNELS
    for target in TARGETS
    for world_size in ((2, 3, 16) if target in ("sm_90", "gfx942") else (8,))
)


def mailbox_cases_of(backend, *kernels):
    """The cases of one backend, of all kernels or of these."""
    kernels = kernels or MAILBOX_KERNELS
    return [c for c in MAILBOX_CASES if TARGETS[c.target].backend == backend and c.kernel in kernels]


def cases_of(backend, **wanted):
    """The cases of one backend; facts about them narrow them down."""
    facts = ((case, _facts(case)) for case in CASES)
    chosen = (case for case, fact in facts if all(fact[name] == value for name, value in wanted.items()))
    return [case for case in chosen if TARGETS[case.target].backend == backend]


def _facts(case):
    spans, lanes = case.protocol.spans > 0, case.protocol.lanes
    payload, multimem = spans or lanes, case.protocol.multimem
    return {
        "aligned": case.aligned, "lanes": lanes, "spans": spans, "payload": payload, "multimem": multimem,
    }  # fmt: skip


@functools.cache
def discovered_kernels():
    """Every `@triton.jit` function of `tcomm.kernels` whose name ends in `_kernel`, by name."""
    names = [found.name for found in pkgutil.walk_packages(kernels.__path__, kernels.__name__ + ".")]
    modules = [importlib.import_module(name) for name in names]
    members = [member for module in modules for member in inspect.getmembers(module)]
    return {name: fn for name, fn in members if name.endswith("_kernel") and hasattr(fn, "arg_names")}


def constants_of(case):
    dtype = DTYPES[case.dtype]
    layout = StagingLayout(STAGING_BYTES, case.world_size)
    return {
        "WORLD": case.world_size,
        "LANES": triton.next_power_of_2(case.world_size),
        "LANE_HALF_BYTES": layout.lane_half_bytes,
        "ATOMIC_POLL": TARGETS[case.target].backend == "hip",
        "VIRTUAL": case.virtual,
        "HALF_BYTES": layout.half_bytes,
        "SLOT_BYTES": layout.slot_bytes,
        "SLICE_UNIT": slice_numel(1, dtype.itemsize, 1),
        "BLOCK": _block_of(case, dtype.itemsize),
        "SHARED": case.op == "shared",
        "UNIT": 16 // dtype.itemsize if case.aligned else 1,
        "OP": case.op,
        "ACC": ACCUMULATORS.get(acc_dtype(dtype)),
    }


def _block_of(case, itemsize):
    if "_ll_" in case.kernel:
        return tile_numel(8)
    sources = case.world_size if case.protocol.reduces else 1
    return tile_of(itemsize, 1 << 30 if case.wide else 1, sources)


def parameters_of(case):
    """Names of the kernel's run-time arguments, in order."""
    return [name for name in discovered_kernels()[case.kernel].arg_names if name in PARAMETERS]


def compile_kernel(fn, target, dtype, constants, aligned=True, max_registers=MAX_REGISTERS):
    """Compile `fn`, whose run-time arguments are those of `PARAMETERS`, without a GPU."""
    names = fn.arg_names
    types = PARAMETERS | MAILBOX_PARAMETERS
    signature = {name: types.get(name, "constexpr").format(dtype=dtype) for name in names}
    pointers = [name for name in names if signature[name].startswith("*")]
    known = [name for name in pointers if aligned or name.endswith("_ptrs")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in known}
    values = {(names.index(name),): value for name, value in constants.items() if name in names}
    options = {"num_warps": COMPILED_THREADS // target.warp_size}
    if target.backend == "cuda":
        options["maxnreg"] = max_registers
    return triton.compile(ASTSource(fn, signature, values, attributes), target=target, options=options)


@functools.cache
def compiled(case):
    fn = discovered_kernels()[case.kernel]
    return compile_kernel(fn, TARGETS[case.target], case.dtype, constants_of(case), case.aligned)


@functools.cache
def compiled_mailbox(case):
    fn, target = discovered_kernels()[case.kernel], TARGETS[case.target]
    constants = mailbox_constants(MailboxLayout(case.world_size), target.backend == "hip")
    return compile_kernel(fn, target, "u8", constants)
