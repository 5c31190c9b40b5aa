"""Kernels that exchange tokens with exact sizes: each part of a call, with the constants of its launcher."""

import dataclasses
import functools

import triton
from triton.compiler import ASTSource

from tcomm.kernels.bound import COMPILED_MAX_REGISTERS, COMPILED_THREADS
from tcomm.kernels.moe_high_throughput import _places_of
from tcomm.kernels.moe_rows import WORDS_A_TILE
from tcomm.memory.layout import StagingLayout
from tcomm.memory.token_regions import DispatchRegions, ReturnRegions
from tests.compile.cases import STAGING_BYTES, TARGETS, discovered_kernels

PARAMETERS = {
    "x_ptr": "*i64", "ids_ptr": "*i64", "weights_ptr": "*i32", "scales_ptr": "*i32", "slots_ptr": "*i32",
    "prefix_ptr": "*i32", "out_ptr": "*i64", "facts_ptr": "*i32", "row_slots_ptr": "*i64",
    "heads_ptr": "*i64", "fetched_ptr": "*i64", "matrix_ptr": "*i32", "first_term_ptr": "*{dtype}",
    "second_term_ptr": "*{dtype}", "topk_ptr": "*i64", "experts_ptr": "*i32", "num_tokens": "i32",
    "num_rows": "i32", "first": "i32", "staging_ptrs": "*i64", "pad_ptrs": "*i64", "signature": "i64",
    "rank": "i32", "budget": "i64",
}  # fmt: skip
GIVING = ("_stage_tokens_kernel", "_return_rows_kernel")
TAKING = ("_fetch_heads_kernel", "_gather_rows_kernel", "_sum_places_kernel")
EXACT_KERNELS = (*GIVING, *TAKING, "_layout_kernel")
_TOPK = 8
_BITS = {"bf16": 16, "fp16": 16, "fp32": 32}


@dataclasses.dataclass(frozen=True)
class ExactCase:
    kernel: str
    target: str
    dtype: str = "bf16"
    world_size: int = 8
    hidden: int = 7168
    virtual: bool = False

    def __str__(self):
        name = self.kernel.removeprefix("_").removesuffix("_kernel")
        tail = "-virtual" * self.virtual
        return f"{self.target}-{name}-{self.dtype}-{self.world_size}x{self.hidden}{tail}"

    @property
    def row_nbytes(self):
        return self.hidden * _BITS[self.dtype] // 8


def _cases():
    for kernel in EXACT_KERNELS:
        for target in TARGETS:
            yield ExactCase(kernel, target)
        yield ExactCase(kernel, "sm_90", "fp32", 3, 264)
        yield ExactCase(kernel, "sm_90", "fp16", 16, 2048, virtual=True)


EXACT_CASES = tuple(_cases())


def exact_cases_of(backend, *kernels):
    """The cases of one backend, of these kernels."""
    return [c for c in EXACT_CASES if TARGETS[c.target].backend == backend and c.kernel in kernels]


def parameters_of(case):
    """Names of the kernel's run-time arguments, in order."""
    return [name for name in discovered_kernels()[case.kernel].arg_names if name in PARAMETERS]


def constants_of(case):
    layout = StagingLayout(STAGING_BYTES, case.world_size)
    width, words = min(_TOPK, case.world_size), case.row_nbytes // 8
    there = DispatchRegions(layout.half_bytes, case.world_size, case.row_nbytes, 2 * _TOPK)
    back = ReturnRegions(layout.half_bytes, width, case.row_nbytes, _TOPK)
    places = _places_of(there)
    if case.kernel in ("_return_rows_kernel", "_sum_places_kernel"):
        tile = 8 * WORDS_A_TILE * 8 // _BITS[case.dtype]
        tile = tile if case.kernel == "_sum_places_kernel" else WORDS_A_TILE
        places = {
            "PIECE": back.num_tokens, "WEIGHTS": back.weights_offset, "BLOCK": tile, "FACT_LANES": _TOPK,
        }  # fmt: skip
    if case.kernel == "_layout_kernel":
        places = {"BLOCK": 256}
    return places | {
        "WORLD": case.world_size, "LANES": triton.next_power_of_2(case.world_size),
        "LANE_HALF_BYTES": layout.lane_half_bytes, "ATOMIC_POLL": TARGETS[case.target].backend == "hip",
        "VIRTUAL": case.virtual, "HALF_BYTES": layout.half_bytes, "ROW_WORDS": words, "ID_WORDS": _TOPK,
        "WEIGHT_WORDS": _TOPK, "SCALE_WORDS": 0, "FACT_WORDS": 2 * _TOPK, "WIDTH": width,
        "HEAD_LANES": triton.next_power_of_2(there.num_head_words), "HIDDEN": case.hidden, "TERMS": 2,
        "TOPK": _TOPK, "LOCAL": 32,
    }  # fmt: skip


def _type_of(case, name):
    if name not in PARAMETERS:
        return "constexpr"
    if case.kernel == "_sum_places_kernel" and name in {"x_ptr", "weights_ptr"}:
        return "*fp32" if name == "weights_ptr" else f"*{case.dtype}"
    return PARAMETERS[name].format(dtype=case.dtype)


@functools.cache
def compiled(case):
    fn, target = discovered_kernels()[case.kernel], TARGETS[case.target]
    names = fn.arg_names
    signature = {name: _type_of(case, name) for name in names}
    pointers = [name for name in names if signature[name].startswith("*")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    values = {(names.index(name),): value for name, value in constants_of(case).items() if name in names}
    options = {"num_warps": COMPILED_THREADS // target.warp_size}
    if target.backend == "cuda":
        options["maxnreg"] = COMPILED_MAX_REGISTERS
    return triton.compile(ASTSource(fn, signature, values, attributes), target=target, options=options)
