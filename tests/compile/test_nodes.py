"""Kernels over several nodes, up to PTX: what the checks of the others say, and the calls of NVSHMEM.

Whether those link is checked in `tests/compile_nvshmem`, which needs NVSHMEM's bitcode.
"""

import functools
import re

import pytest

from tests.compile import inspect_asm
from tests.compile.node_cases import NODE_CASES, parameters_of, unlinked

every_case = pytest.mark.parametrize("case", NODE_CASES, ids=str)
reducing_case = pytest.mark.parametrize("case", [c for c in NODE_CASES if c.op], ids=str)

PUT, SIGNAL = "nvshmemx_putmem_signal_nbi_block", "nvshmemx_signal_op"
QUIET, WAIT = "nvshmem_quiet", "nvshmem_signal_wait_until"


@functools.cache
def ptx_of(case):
    return inspect_asm.Ptx(unlinked(case), parameters_of(case))


def calls_of(ptx, symbol):
    return [op for op in ptx.ops if op.opcode.startswith("call") and f" {symbol}," in f" {op.operands},"]


def is_call(op):
    return op.opcode.startswith("call")


def check_calls(ptx, nodes):
    """A put and, for programs without data, a signal to each other node; one quiet; a wait per other node."""
    found = {symbol: len(calls_of(ptx, symbol)) for symbol in (PUT, SIGNAL, QUIET, WAIT)}
    assert found == {PUT: nodes - 1, SIGNAL: nodes - 1, QUIET: 1, WAIT: nodes - 1}, found
    assert sum(map(is_call, ptx.ops)) == 3 * nodes - 2, "other functions are called"


def check_puts_follow_barriers(ptx):
    """Between whatever another warp stored and a put, on every path, all warps meet."""
    for op in calls_of(ptx, PUT) + calls_of(ptx, SIGNAL) + calls_of(ptx, QUIET):
        for earlier in ptx.before(op, lambda found: found.is_barrier):
            assert earlier is not None, f"no barrier between the entry and {op}"
            late = earlier.opcode.startswith("st.") and ptx.is_payload(earlier)
            assert not late, f"no barrier between {earlier} and {op}"


def check_one_thread_signals(ptx):
    """A signal, a quiet and a wait come from one thread: a branch on its number leads there."""
    numbers = {op.operands.partition(",")[0] for op in ptx.matching("mov") if op.operands.endswith("%tid.x")}
    for op in calls_of(ptx, SIGNAL) + calls_of(ptx, QUIET) + calls_of(ptx, WAIT):
        path = ptx.before(op, lambda found: found.is_barrier)
        tests = [e.operands.split(", ") for e in path if e is not None and e.opcode.startswith("setp")]
        assert any(numbers & set(operands) and "0" in operands for operands in tests), f"{op} by all threads"


def check_waits_are_bounded(ptx):
    """NVSHMEM's own wait comes only after an acquire of the words that it waits for, found there."""
    acquires = set(inspect_asm._acquires(ptx))
    for op in calls_of(ptx, WAIT):
        for earlier in ptx.before(op, acquires.__contains__):
            assert earlier is not None, f"{op} has no poll before it"
            assert not (is_call(earlier) and QUIET in earlier.operands), (
                f"{op} follows the put without a poll"
            )


@every_case
def test_publishes_are_releases_at_system_scope(case):
    inspect_asm.check_publish_semantics(ptx_of(case), case.stages.publishes)


@every_case
def test_all_warps_meet_before_a_publish(case):
    inspect_asm.check_publish_barriers(ptx_of(case))


@every_case
def test_acquires_are_at_system_scope(case):
    inspect_asm.check_acquire_semantics(ptx_of(case), case.stages.waits)


@every_case
def test_all_warps_meet_after_an_acquire(case):
    inspect_asm.check_acquire_barriers(ptx_of(case))


@every_case
def test_staging_is_read_only_after_an_acquire(case):
    inspect_asm.check_loads_follow_acquires(ptx_of(case))


@every_case
def test_gpu_scope_is_for_own_words_only(case):
    inspect_asm.check_atomics(ptx_of(case), case.stages.waits)


@every_case
def test_no_spin_loop_is_deleted(case):
    inspect_asm.check_spins(ptx_of(case), case.stages.waits, 0)


@every_case
def test_loops_move_128_bits(case):
    inspect_asm.check_vectors(ptx_of(case), case.stages.spans)


@reducing_case
def test_arithmetic_is_that_of_the_reference(case):
    inspect_asm.check_arithmetic(ptx_of(case))


@every_case
def test_data_and_word_go_to_each_other_node_in_one_put(case):
    check_calls(ptx_of(case), case.nodes)


@every_case
def test_all_warps_meet_before_a_put(case):
    check_puts_follow_barriers(ptx_of(case))


@every_case
def test_one_thread_signals_and_waits_for_all(case):
    check_one_thread_signals(ptx_of(case))


@every_case
def test_no_wait_is_left_to_nvshmem(case):
    check_waits_are_bounded(ptx_of(case))


FLAWS = (
    (r"bar\.sync.*", check_puts_follow_barriers, "no barrier between"),
    (r"bar\.sync.*", inspect_asm.check_publish_barriers, "no barrier between"),
    (r"atom\S*acquire[^;]*;", check_waits_are_bounded, "without a poll"),
    (r"%tid\.x", check_one_thread_signals, "by all threads"),
    (QUIET, lambda ptx: check_calls(ptx, 2), "nvshmem_quiet': 0"),
    (PUT, lambda ptx: check_calls(ptx, 2), "nbi_block': 0"),
    (r"\.volatile", lambda ptx: inspect_asm.check_spins(ptx, 3, 0), "0 loops wait for words"),
)
"""What is cut out of the assembly of a sound kernel, a check, and what it then says."""


@pytest.mark.parametrize(("flaw", "check", "message"), FLAWS, ids=[message for *_, message in FLAWS])
def test_ptx_without_it_fails(flaw, check, message):
    (case,) = [c for c in NODE_CASES if str(c) == "sm_90-all_reduce-bf16-2x4-sum"]
    broken = inspect_asm.Ptx(re.sub(flaw, "", unlinked(case)), parameters_of(case))
    with pytest.raises(AssertionError, match=message):
        check(broken)
