import functools

import pytest

from tests.compile import inspect_asm
from tests.compile.cases import (
    MAILBOX_KERNELS,
    MAX_REGISTERS,
    PROTOCOLS,
    cases_of,
    compiled,
    discovered_kernels,
    parameters_of,
)
from tests.compile.eplb_cases import EPLB_KERNELS
from tests.compile.moe_exchange_cases import EXCHANGE_KERNELS
from tests.compile.moe_high_throughput_cases import EXACT_KERNELS
from tests.compile.moe_low_latency_cases import LOW_LATENCY_KERNELS
from tests.compile.node_cases import NODE_KERNELS

every_case = pytest.mark.parametrize("case", cases_of("cuda"), ids=str)
span_case = pytest.mark.parametrize("case", cases_of("cuda", aligned=True, spans=True), ids=str)
payload_case = pytest.mark.parametrize("case", cases_of("cuda", payload=True), ids=str)
lane_case = pytest.mark.parametrize("case", cases_of("cuda", lanes=True), ids=str)


@functools.cache
def ptx_of(case):
    return inspect_asm.Ptx(compiled(case).asm["ptx"], parameters_of(case))


def lane_spins_of(case):
    return case.world_size if case.protocol.lanes else 0


def test_every_kernel_has_a_case():
    tokens = {*EPLB_KERNELS, *EXACT_KERNELS, *EXCHANGE_KERNELS, *LOW_LATENCY_KERNELS}
    assert discovered_kernels().keys() == PROTOCOLS.keys() | {*MAILBOX_KERNELS, *NODE_KERNELS} | tokens


@every_case
def test_publishes_are_releases_at_system_scope(case):
    inspect_asm.check_publish_semantics(ptx_of(case), case.protocol.phases)


@every_case
def test_all_warps_meet_before_a_publish(case):
    inspect_asm.check_publish_barriers(ptx_of(case))


@every_case
def test_acquires_are_at_system_scope(case):
    inspect_asm.check_acquire_semantics(ptx_of(case), case.protocol.phases)


@every_case
def test_all_warps_meet_after_an_acquire(case):
    inspect_asm.check_acquire_barriers(ptx_of(case))


@payload_case
def test_staging_is_read_only_after_an_acquire(case):
    inspect_asm.check_loads_follow_acquires(ptx_of(case))


@every_case
def test_gpu_scope_is_for_own_words_only(case):
    inspect_asm.check_atomics(ptx_of(case), case.protocol.phases, lane_spins_of(case))


@every_case
def test_no_spin_loop_is_deleted(case):
    inspect_asm.check_spins(ptx_of(case), case.protocol.phases, lane_spins_of(case))


@every_case
def test_every_wait_has_a_deadline_and_can_be_aborted(case):
    inspect_asm.check_deadlines(ptx_of(case), case.protocol.phases + lane_spins_of(case))


@span_case
def test_loops_move_128_bits(case):
    inspect_asm.check_vectors(ptx_of(case), case.protocol.spans)


@lane_case
def test_lanes_are_never_split(case):
    inspect_asm.check_lanes(ptx_of(case), case.world_size)


@every_case
def test_arithmetic_is_that_of_the_reference(case):
    inspect_asm.check_arithmetic(ptx_of(case))


@every_case
def test_nothing_is_spilled(case):
    inspect_asm.check_resources(compiled(case).asm["cubin"], MAX_REGISTERS)
