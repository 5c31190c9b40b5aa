"""Kernels of low-latency dispatch and combine, with the constants that their launchers give them."""

import dataclasses
import functools

import triton
from triton.compiler import ASTSource

from tcomm.kernels.launch import COMPILED_THREADS
from tcomm.memory.layout import StagingLayout
from tcomm.memory.moe_slots import RowFormat, SlotLayout
from tests.compile.cases import DTYPES, MAX_REGISTERS, TARGETS, discovered_kernels

PARAMETERS = {
    "_plan_kernel": {"idx_ptr": "*i64", "slots_ptr": "*i32", "counts_ptr": "*i32", "num_tokens": "i32"},
    "_send_copies_kernel": {
        "rows_ptr": "*{dtype}", "idx_ptr": "*i64", "slots_ptr": "*i32", "counts_ptr": "*i32",
        "num_tokens": "i32",
    },
    "_receive_copies_kernel": {
        "rows_ptr": "*i32", "scales_ptr": "*i32", "info_ptr": "*i32", "ranges_ptr": "*i64",
        "received_ptr": "*i32", "stats_ptr": "*i32", "waits_ptr": "*i64",
    },
    "_send_rows_kernel": {"rows_ptr": "*{dtype}", "ranges_ptr": "*i64", "number": "i32"},
    "_sum_rows_kernel": {
        "out_ptr": "*{dtype}", "idx_ptr": "*i64", "weights_ptr": "*fp32", "slots_ptr": "*i32",
        "counts_ptr": "*i32", "num_tokens": "i32", "lent_ptrs": "*i64",
    },
}  # fmt: skip
EVERY = {
    "staging_ptrs": "*i64", "pad_ptrs": "*i64", "signature": "i64", "rank": "i32", "budget": "i64",
}  # fmt: skip
SENDING = ("_send_copies_kernel", "_send_rows_kernel")
WAITING = ("_receive_copies_kernel", "_sum_rows_kernel")
LOW_LATENCY_KERNELS = tuple(PARAMETERS)


@dataclasses.dataclass(frozen=True)
class LowLatencyCase:
    kernel: str
    target: str
    dtype: str = "bf16"
    world_size: int = 8
    hidden: int = 7168
    scaling: tuple = ()
    lends: bool = False
    virtual: bool = False

    def __str__(self):
        name = self.kernel.removeprefix("_").removesuffix("_kernel")
        more = [str(sum(self.scaling)) + "fp8"] * any(self.scaling) + ["lends"] * self.lends
        more += ["virtual"] * self.virtual
        return "-".join([self.target, name, self.dtype, str(self.world_size), str(self.hidden), *more])


def _cases():
    fp8, ue8m0 = (True, False, False), (True, True, True)
    for target in TARGETS:
        for kernel in PARAMETERS:
            yield LowLatencyCase(kernel, target)
    for target in ("sm_90", "sm_100", "gfx942"):
        yield LowLatencyCase("_send_copies_kernel", target, scaling=fp8)
        yield LowLatencyCase("_send_copies_kernel", target, scaling=ue8m0, world_size=3, hidden=640)
        yield LowLatencyCase("_receive_copies_kernel", target, scaling=ue8m0)
        yield LowLatencyCase("_sum_rows_kernel", target, lends=True)
    for kernel in PARAMETERS:
        yield LowLatencyCase(kernel, "sm_90", dtype="fp32", world_size=3, hidden=1032)
        yield LowLatencyCase(kernel, "sm_90", scaling=fp8 if "copies" in kernel else (), virtual=True)
    yield LowLatencyCase("_send_rows_kernel", "sm_90", lends=True)


CASES = tuple(_cases())


def cases_of(backend, *kernels):
    return [c for c in CASES if TARGETS[c.target].backend == backend and c.kernel in (kernels or PARAMETERS)]


def constants_of(case):
    dtype = DTYPES[case.dtype]
    layout = SlotLayout(case.world_size, 32, 128, 8, case.hidden, dtype.itemsize)
    form = RowFormat(case.hidden, dtype, *case.scaling)
    staging = StagingLayout(StagingLayout.for_half(layout.half_nbytes, case.world_size), case.world_size)
    return {
        "WORLD": case.world_size, "LANES": triton.next_power_of_2(case.world_size),
        "LANE_HALF_BYTES": staging.lane_half_bytes, "HALF_BYTES": staging.half_bytes,
        "ATOMIC_POLL": TARGETS[case.target].backend == "hip", "VIRTUAL": case.virtual, "TOPK": 8,
        "EXPERTS": 32, "EXPERT_LANES": 32, "SLOTS": layout.slots, "CAPACITY": layout.capacity,
        "SOURCE_BYTES": layout.slots * case.hidden * dtype.itemsize,
        "SOURCE_SCALES": layout.slots * (case.hidden // 128),
        "HIDDEN": case.hidden, "ROWS_AT": layout.rows_offset, "SCALES_AT": layout.scales_offset,
        "INDICES_AT": layout.indices_offset, "ROW_BYTES": form.row_nbytes,
        "SCALE_WORDS": form.num_scale_words, "ROUND": form.round_scale, "UE8M0": form.use_ue8m0,
        "SCALE_LANES": triton.next_power_of_2(max(form.num_scale_words, 1)),
        "BY_INSTRUCTION": case.target in {"sm_90", "sm_100"}, "HAS_STATS": True, "HAS_WAITS": True,
        "LENDS": case.lends, "LENT_AT": staging.half(0), "LENT_BYTES": staging.half_bytes,
        "TOKENS": 128, "TILE": min(32, triton.next_power_of_2(max(case.hidden // 128, 4))),
        "BLOCK": 4096 // dtype.itemsize if case.kernel == "_sum_rows_kernel" else 1024,
    }  # fmt: skip


def parameters_of(case):
    """Names of the kernel's run-time arguments, in order."""
    return [
        name
        for name in discovered_kernels()[case.kernel].arg_names
        if name in EVERY | PARAMETERS[case.kernel]
    ]


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
