import re

import pytest

from tests.compile import inspect_asm
from tests.compile.cases import MAX_REGISTERS, discovered_kernels
from tests.compile.eplb_cases import cases_of, compiled

every_case = pytest.mark.parametrize("case", cases_of("cuda"), ids=str)
amd_case = pytest.mark.parametrize("case", cases_of("hip"), ids=str)


@every_case
def test_nothing_is_spilled(case):
    inspect_asm.check_resources(compiled(case).asm["cubin"], MAX_REGISTERS)


@every_case
def test_a_counter_is_added_to_once_a_slot_and_block(case):
    """By a relaxed addition: other GPUs never look, and sums of integers have no order."""
    added = re.findall(r"\b(?:red|atom)\.(?:\w+\.)*global[\w.]*", compiled(case).asm["ptx"])
    bits = 64 if case.load == "i64" else 32
    assert all(f"add.u{bits}" in op and "gpu" in op and "relaxed" in op for op in added)
    bins = max(32, 1 << (case.num_slots - 1).bit_length()) if case.num_slots else 0
    assert len(added) == -(-bins // 256)


@every_case
def test_numbering_needs_no_exchange_between_threads(case):
    """Each thread compares one choice with all others of its block."""
    before_slots_are_stored = compiled(case).asm["ptx"].split("st.global")[0]
    assert re.search(r"shfl|redux", before_slots_are_stored) is None or case.shares


def test_no_layer_has_a_kernel_of_its_own():
    """Rows of a counter, lengths and ranks differ between calls; a kernel must not be compiled for each."""
    parameters = {
        p.name: p for p in discovered_kernels()["_choose_slots_kernel"].params if not p.is_constexpr
    }
    assert {p.name for p in parameters.values() if p.name.endswith("_ptr")} == {
        p.name for p in parameters.values() if p.do_not_specialize_on_alignment
    }
    assert all(p.do_not_specialize for name, p in parameters.items() if not name.endswith("_ptr"))


@amd_case
def test_kernels_compile_for_amd(case):
    assert "s_endpgm" in compiled(case).asm["amdgcn"]
