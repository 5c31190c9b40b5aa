"""Kernels of the one-sided and the two-sided exchange, with the constants that their launchers give them."""

import dataclasses
import functools

import triton
from triton.compiler import ASTSource

from tcomm.kernels.launch import COMPILED_THREADS
from tcomm.kernels.moe_row_tables import row_constants
from tcomm.kernels.moe_two_sided import ring_constants
from tcomm.memory.layout import StagingLayout
from tcomm.memory.rings import RingLayout
from tests.compile.cases import DTYPES, MAX_REGISTERS, STAGING_BYTES, TARGETS, discovered_kernels

_ROWS = {"x_ptr": "*{dtype}", "out_ptr": "*{dtype}", "x_stride": "i32", "out_stride": "i32"}
_TOKENS = {"codes_ptr": "*i32", "num_tokens": "i32", "runtime_max": "i32", "region": "i64"}
PARAMETERS = {
    "_open_call_kernel": {"counts_ptr": "*i64"},
    "_take_counts_kernel": {"received_ptr": "*i64"},
    "_push_payload_kernel": _ROWS | _TOKENS,
    "_stage_results_kernel": _ROWS | _TOKENS | {"received_ptr": "*i64"},
    "_pull_sums_kernel": _ROWS | _TOKENS,
    "_stream_rows_kernel": _ROWS
    | {
        "given_ptr": "*i64", "num_given_ptr": "*i64", "taken_ptr": "*i64", "num_taken_ptr": "*i64",
        "capacity": "i32",
    },
}  # fmt: skip
EVERY = {"staging_ptrs": "*i64", "pad_ptrs": "*i64", "signature": "i64", "rank": "i32", "budget": "i64"}
EXCHANGE_KERNELS = tuple(PARAMETERS)
MOVING = ("_push_payload_kernel", "_stage_results_kernel", "_pull_sums_kernel", "_stream_rows_kernel")
WAITING = ("_take_counts_kernel", "_pull_sums_kernel")


@dataclasses.dataclass(frozen=True)
class ExchangeCase:
    kernel: str
    target: str
    dtype: str = "i64"
    row_words: int = 1792
    world_size: int = 8
    virtual: bool = False

    def __str__(self):
        name = self.kernel.removeprefix("_").removesuffix("_kernel")
        tail = "-virtual" * self.virtual
        return f"{self.target}-{name}-{self.dtype}-{self.world_size}-{self.row_words}{tail}"

    @property
    def sums(self):
        return self.kernel == "_pull_sums_kernel"


def _cases():
    for kernel in PARAMETERS:
        moves = kernel in MOVING
        usual = ("bf16", 7168) if kernel == "_pull_sums_kernel" else ("i64", 1792)
        for target in ("sm_90", "sm_100", "gfx942"):
            yield ExchangeCase(kernel, target, *usual)
        yield ExchangeCase(kernel, "sm_90", *usual, world_size=3, virtual=True)
        if moves:
            odd = ("fp32", 1032) if kernel == "_pull_sums_kernel" else ("u8", 7)
            yield ExchangeCase(kernel, "sm_90", *odd, world_size=2)
    yield ExchangeCase("_stream_rows_kernel", "sm_90", "i64", 20000)


CASES = tuple(_cases())


def cases_of(backend, *kernels):
    return [c for c in CASES if TARGETS[c.target].backend == backend and c.kernel in (kernels or PARAMETERS)]


def constants_of(case):
    itemsize = DTYPES[case.dtype].itemsize
    layout = StagingLayout(STAGING_BYTES, case.world_size)
    rings = RingLayout(case.world_size, min(4, 32 // case.world_size), 65536)
    return {
        "WORLD": case.world_size, "LANES": triton.next_power_of_2(case.world_size),
        "LANE_HALF_BYTES": layout.lane_half_bytes, "VIRTUAL": case.virtual, "COUNTED": True, "TOP_K": 8,
        "ATOMIC_POLL": TARGETS[case.target].backend == "hip",
        **ring_constants(rings, case.row_words, itemsize, 4096),
        **row_constants(case.row_words, itemsize, 4096),
    }  # fmt: skip


def parameters_of(case):
    """Names of the kernel's run-time arguments, in order."""
    known = EVERY | PARAMETERS[case.kernel]
    return [name for name in discovered_kernels()[case.kernel].arg_names if name in known]


@functools.cache
def compiled(case):
    fn, target = discovered_kernels()[case.kernel], TARGETS[case.target]
    types = EVERY | PARAMETERS[case.kernel]
    signature = {name: types.get(name, "constexpr").format(dtype=case.dtype) for name in fn.arg_names}
    pointers = [name for name in fn.arg_names if signature[name].startswith("*")]
    attributes = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    known = constants_of(case)
    values = {(index,): known[name] for index, name in enumerate(fn.arg_names) if name in known}
    options = {"num_warps": COMPILED_THREADS // target.warp_size}
    if target.backend == "cuda":
        options["maxnreg"] = MAX_REGISTERS
    return triton.compile(ASTSource(fn, signature, values, attributes), target=target, options=options)
