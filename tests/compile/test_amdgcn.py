import functools

import pytest

from tests.compile import inspect_asm
from tests.compile.cases import MAX_REGISTERS, cases_of, compiled, write_back_not_awaited

every_case = pytest.mark.parametrize("case", cases_of("hip"), ids=str)
span_case = pytest.mark.parametrize("case", cases_of("hip", aligned=True, spans=True), ids=str)
lane_case = pytest.mark.parametrize("case", cases_of("hip", lanes=True), ids=str)


@functools.cache
def flow_of(case):
    return inspect_asm.Flow(compiled(case).asm["amdgcn"])


@write_back_not_awaited
@every_case
def test_publishes_write_caches_back(case):
    inspect_asm.check_gcn_publishes(flow_of(case), case.protocol.phases)


@every_case
def test_all_waves_meet_before_a_publish(case):
    inspect_asm.check_gcn_publish_barriers(flow_of(case))


@every_case
def test_spins_poll_past_the_caches(case):
    lane_spins = case.world_size if case.protocol.lanes else 0
    inspect_asm.check_gcn_spins(flow_of(case), case.protocol.phases, lane_spins)


@every_case
def test_acquires_invalidate_caches(case):
    inspect_asm.check_gcn_acquires(flow_of(case), case.protocol.phases)


@span_case
def test_loops_move_128_bits(case):
    inspect_asm.check_gcn_vectors(flow_of(case), case.protocol.spans)


@lane_case
def test_lanes_are_never_split(case):
    inspect_asm.check_gcn_lanes(flow_of(case), case.world_size)


@every_case
def test_nothing_is_spilled(case):
    inspect_asm.check_gcn_resources(compiled(case).asm["amdgcn"], MAX_REGISTERS)
