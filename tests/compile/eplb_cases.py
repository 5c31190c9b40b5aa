"""The kernel that chooses slots of experts, with the constants that its launcher gives it."""

import dataclasses
import functools

import triton
from triton.compiler import ASTSource

from tcomm.kernels.bound import COMPILED_THREADS
from tcomm.kernels.expert_slots import block_constants
from tests.compile.cases import MAX_REGISTERS, TARGETS, discovered_kernels

EPLB_KERNELS = ("_choose_slots_kernel",)
PARAMETERS = {
    "topk_ptr": "*{ids}", "map_ptr": "*i64", "count_ptr": "*i64", "share_ptr": "*i32", "out_ptr": "*{ids}",
    "load_ptr": "*{load}", "unpadded_ptr": "*i64", "record_ptr": "*u8", "num_choices": "i32",
    "num_counted": "i32", "topk": "i32", "num_experts": "i32", "width": "i32", "stride": "i32", "salt": "i32",
    "first_slot": "i32", "num_slots": "i32",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SlotsCase:
    target: str
    num_slots: int
    ids: str = "i64"
    load: str = "i32"
    shares: bool = False
    on_device: bool = True
    """Whether what counts is said by tensors."""

    def __str__(self):
        tail = "-shares" * self.shares + "-tensors" * self.on_device
        return f"{self.target}-{self.num_slots}-{self.ids}-{self.load}{tail}"


def _cases():
    for target in TARGETS:
        yield SlotsCase(target, 288)
        yield SlotsCase(target, 9, "i32", "i64", shares=True)
    yield SlotsCase("sm_90", 0, on_device=False)
    yield SlotsCase("sm_90", 1024, load="i64", shares=True, on_device=False)


CASES = tuple(_cases())


def cases_of(backend):
    return [case for case in CASES if TARGETS[case.target].backend == backend]


@functools.cache
def compiled(case):
    fn, target = discovered_kernels()["_choose_slots_kernel"], TARGETS[case.target]
    known = {"HAS_SHARE": case.shares, "HAS_UNPADDED": case.on_device, "HAS_RECORD": case.on_device}
    known |= block_constants(case.num_slots)
    types = {name: kind.format(ids=case.ids, load=case.load) for name, kind in PARAMETERS.items()}
    signature = {name: types.get(name, "constexpr") for name in fn.arg_names}
    values = {(index,): known[name] for index, name in enumerate(fn.arg_names) if name in known}
    options = {"num_warps": COMPILED_THREADS // target.warp_size}
    if target.backend == "cuda":
        options["maxnreg"] = MAX_REGISTERS
    # Nothing is known of where tensors begin: the launcher's kernel does not ask.
    return triton.compile(ASTSource(fn, signature, values, {}), target=target, options=options)
