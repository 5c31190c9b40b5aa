"""Kernels that exchange tokens with exact sizes: who publishes, who waits, and that rows move wide."""

import functools

import pytest

from tests.compile import inspect_asm
from tests.compile.cases import MAX_REGISTERS, write_back_not_awaited
from tests.compile.moe_high_throughput_cases import (
    EXACT_KERNELS,
    GIVING,
    TAKING,
    compiled,
    exact_cases_of,
    parameters_of,
)


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=str)


giving_case, taking_case = each(exact_cases_of("cuda", *GIVING)), each(exact_cases_of("cuda", *TAKING))
moving_case = each(exact_cases_of("cuda", *GIVING, "_gather_rows_kernel", "_sum_places_kernel"))
every_case = each(exact_cases_of("cuda", *EXACT_KERNELS))


@functools.cache
def ptx_of(case):
    return inspect_asm.Ptx(compiled(case).asm["ptx"], parameters_of(case))


@functools.cache
def flow_of(case):
    return inspect_asm.Flow(compiled(case).asm["amdgcn"])


@giving_case
def test_what_gives_publishes_once_behind_all_warps_and_waits_for_nobody(case):
    inspect_asm.check_publish_semantics(ptx_of(case), 1)
    inspect_asm.check_publish_barriers(ptx_of(case))
    inspect_asm.check_spins(ptx_of(case), 0, 0)


@taking_case
def test_what_takes_reads_staging_behind_a_bounded_wait_and_publishes_nothing(case):
    inspect_asm.check_publish_semantics(ptx_of(case), 0)
    inspect_asm.check_acquire_semantics(ptx_of(case), 1)
    inspect_asm.check_acquire_barriers(ptx_of(case))
    inspect_asm.check_loads_follow_acquires(ptx_of(case))
    inspect_asm.check_spins(ptx_of(case), 1, 0)
    inspect_asm.check_deadlines(ptx_of(case), 1)


@moving_case
def test_rows_move_by_128_bits(case):
    ops = [op for op in ptx_of(case).ops if inspect_asm._is_plain_access(op) and ptx_of(case).is_payload(op)]
    wide = [op for op in ops if inspect_asm._bits(op)[1] == 128]
    assert any(map(inspect_asm._is_load, wide)), "rows are loaded by less"
    assert any(map(inspect_asm._is_store, wide)), "rows are stored by less"


@every_case
def test_nothing_is_spilled_and_no_product_is_fused_into_a_sum(case):
    inspect_asm.check_resources(compiled(case).asm["cubin"], MAX_REGISTERS)
    inspect_asm.check_arithmetic(ptx_of(case))


@write_back_not_awaited
@each(exact_cases_of("hip", *GIVING))
def test_publishes_write_caches_back(case):
    inspect_asm.check_gcn_publishes(flow_of(case), 1)
    inspect_asm.check_gcn_publish_barriers(flow_of(case))


@each(exact_cases_of("hip", *TAKING))
def test_acquires_invalidate_caches(case):
    inspect_asm.check_gcn_acquires(flow_of(case), 1)
    inspect_asm.check_gcn_spins(flow_of(case), 1, 0)


@each(exact_cases_of("hip", *EXACT_KERNELS))
def test_nothing_is_spilled_on_amd(case):
    inspect_asm.check_gcn_resources(compiled(case).asm["amdgcn"], MAX_REGISTERS)
