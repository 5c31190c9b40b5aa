import functools
import re

import pytest

from tcomm.memory.control import Word
from tests.compile import inspect_asm
from tests.compile.cases import MAX_REGISTERS
from tests.compile.moe_low_latency_cases import SENDING, WAITING, cases_of, compiled, parameters_of

every_case = pytest.mark.parametrize("case", cases_of("cuda"), ids=str)
sending_case = pytest.mark.parametrize("case", cases_of("cuda", *SENDING), ids=str)
waiting_case = pytest.mark.parametrize("case", cases_of("cuda", *WAITING), ids=str)
amd_case = pytest.mark.parametrize("case", cases_of("hip"), ids=str)


@functools.cache
def ptx_of(case):
    return inspect_asm.Ptx(compiled(case).asm["ptx"], parameters_of(case))


@every_case
def test_nothing_is_spilled(case):
    inspect_asm.check_resources(compiled(case).asm["cubin"], MAX_REGISTERS)


@sending_case
def test_what_was_sent_is_published_once_at_system_scope(case):
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


@pytest.mark.parametrize("case", cases_of("cuda", *SENDING, *WAITING), ids=str)
def test_whom_to_leave_out_is_read_once_and_in_no_loop(case):
    ptx = ptx_of(case)
    own = [op for op in ptx.matching(r"ld\.global") if ptx.touches(op, "*pad[rank]")]
    (read,) = [op for op in own if ptx.word(op) == Word.LEFT_OUT]
    assert not any(read in loop for loop in ptx.loops)


def _rows_of(case):
    """Accesses of 128 bits, in loops."""
    ptx = ptx_of(case)
    return [
        op
        for loop in ptx.loops
        for op in loop
        if re.match(r"(ld|st)\.(volatile\.)?global.*v4\.b32", op.opcode)
    ]


# A short row that is quantised has fewer channels than a vector for each thread.
@pytest.mark.parametrize(
    "case",
    [c for c in cases_of("cuda", *SENDING, *WAITING) if not (c.scaling and c.hidden < 4096)],
    ids=str,
)
def test_rows_move_by_128_bits(case):
    moves = _rows_of(case)
    lends = case.lends and case.kernel == "_send_rows_kernel"
    assert lends or any(op.opcode.startswith("ld") for op in moves)
    assert lends or any(op.opcode.startswith("st") for op in moves)
    assert not lends or not moves


@pytest.mark.parametrize("case", [c for c in cases_of("cuda", "_send_copies_kernel") if c.scaling], ids=str)
def test_e4m3_is_rounded_by_an_instruction_where_there_is_one_and_quotients_are_exact(case):
    text = compiled(case).asm["ptx"]
    assert "cvt.rn.satfinite.e4m3x2.f32" in text
    assert "div.rn.f32" in text
    assert "div.full" not in text


@amd_case
def test_kernels_compile_for_amd(case):
    assert "s_endpgm" in compiled(case).asm["amdgcn"]
