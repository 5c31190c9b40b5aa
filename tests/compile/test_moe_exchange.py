import functools
import re

import pytest

from tests.compile import inspect_asm
from tests.compile.cases import MAX_REGISTERS
from tests.compile.moe_exchange_cases import MOVING, WAITING, cases_of, compiled, parameters_of

STREAM = "_stream_rows_kernel"
WIDE = r"(ld|st)\.(volatile\.)?global.*(v4\.b32|v2\.b64)"
every_case = pytest.mark.parametrize("case", cases_of("cuda"), ids=str)
waiting_case = pytest.mark.parametrize("case", cases_of("cuda", *WAITING), ids=str)
opening_case = pytest.mark.parametrize("case", cases_of("cuda", "_open_call_kernel"), ids=str)
stream_case = pytest.mark.parametrize("case", cases_of("cuda", STREAM), ids=str)
wide_case = pytest.mark.parametrize(
    "case", [case for case in cases_of("cuda", *MOVING) if case.dtype != "u8"], ids=str
)
amd_case = pytest.mark.parametrize("case", cases_of("hip"), ids=str)


@functools.cache
def ptx_of(case):
    return inspect_asm.Ptx(compiled(case).asm["ptx"], parameters_of(case))


@every_case
def test_nothing_is_spilled(case):
    inspect_asm.check_resources(compiled(case).asm["cubin"], MAX_REGISTERS)


@opening_case
def test_a_call_is_published_once_at_system_scope_after_all_warps_met(case):
    inspect_asm.check_publish_semantics(ptx_of(case), 1)
    inspect_asm.check_publish_barriers(ptx_of(case))


@waiting_case
def test_what_was_sent_is_read_after_an_acquire_and_a_wait_that_ends(case):
    ptx = ptx_of(case)
    inspect_asm.check_acquire_semantics(ptx, 1)
    inspect_asm.check_acquire_barriers(ptx)
    inspect_asm.check_loads_follow_acquires(ptx)
    inspect_asm.check_spins(ptx, 1, 0)
    inspect_asm.check_deadlines(ptx, 1)


def _on_rings(case, pattern):
    """Accesses to rings of a kind; the compiler makes loads of atomics that add nothing."""
    return [op for op in ptx_of(case).matching(pattern) if ptx_of(case).touches(op, "*staging")]


@stream_case
def test_counts_of_slots_are_released_and_acquired_at_system_scope_with_all_warps(case):
    ptx = ptx_of(case)
    released = _on_rings(case, r"atom\b.*\bexch\b")
    acquired = _on_rings(case, r"atom\b.*\badd\b|ld\b.*\bacquire\b")
    assert len(released) == 2
    assert len(acquired) == 4
    assert all({"sys", "release"} <= set(op.opcode.split(".")) for op in released)
    assert all({"sys", "acquire"} <= set(op.opcode.split(".")) for op in acquired)
    for op in released:
        for earlier in ptx.before(op, lambda found: found.is_barrier):
            assert earlier is not None
            assert not (inspect_asm._is_store(earlier) and ptx.is_payload(earlier)), f"{earlier}, {op}"
    for op in acquired:
        for later in ptx.after(op, lambda found: found.is_barrier):
            assert not ptx.is_payload(later), f"{op}, {later}"


@stream_case
def test_both_waits_poll_and_end(case):
    inspect_asm.check_deadlines(ptx_of(case), 2)


@stream_case
def test_a_rank_that_is_done_says_so_once(case):
    inspect_asm.check_publish_semantics(ptx_of(case), 1)


@wide_case
def test_rows_move_by_128_bits(case):
    moves = [op for loop in ptx_of(case).loops for op in loop if re.match(WIDE, op.opcode)]
    assert any(op.opcode.startswith("ld") for op in moves)
    assert any(op.opcode.startswith("st") for op in moves)


@amd_case
def test_kernels_compile_for_amd(case):
    assert "s_endpgm" in compiled(case).asm["amdgcn"]
