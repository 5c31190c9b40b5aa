"""Send and recv: what the checks of the other kernels say, for counts in place of arrival words."""

import functools
import re

import pytest

from tests.compile import inspect_asm
from tests.compile.cases import (
    MAX_REGISTERS,
    compiled_mailbox,
    mailbox_cases_of,
    write_back_not_awaited,
)


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=str)


def loops_over(case):
    """Loops that move a slot; a slot of larger worlds is a single tile."""
    return 1 if case.world_size <= 8 else 0


on_cuda = each(mailbox_cases_of("cuda"))
recv_on_cuda = each(mailbox_cases_of("cuda", "_recv_kernel"))
on_hip = each(mailbox_cases_of("hip"))


@functools.cache
def ptx_of(case):
    return inspect_asm.Ptx(compiled_mailbox(case).asm["ptx"])


@functools.cache
def flow_of(case):
    return inspect_asm.Flow(compiled_mailbox(case).asm["amdgcn"])


@on_cuda
def test_heads_and_tails_are_published_by_releases_at_system_scope(case):
    inspect_asm.check_publish_semantics(ptx_of(case), 1)


@on_cuda
def test_all_warps_meet_before_a_publish(case):
    inspect_asm.check_publish_barriers(ptx_of(case))


@on_cuda
def test_counts_are_acquired_at_system_scope(case):
    inspect_asm.check_acquire_semantics(ptx_of(case), 1)


@on_cuda
def test_all_warps_meet_after_an_acquire(case):
    inspect_asm.check_acquire_barriers(ptx_of(case))


@recv_on_cuda
def test_slots_are_read_only_after_an_acquire(case):
    inspect_asm.check_loads_follow_acquires(ptx_of(case))


@on_cuda
def test_gpu_scope_is_for_the_count_of_blocks_after_a_barrier(case):
    inspect_asm.check_mailbox_atomics(ptx_of(case), 2 if case.kernel == "_recv_kernel" else 1)


@on_cuda
def test_no_spin_loop_is_deleted(case):
    inspect_asm.check_mailbox_spins(ptx_of(case))


@on_cuda
def test_loops_move_128_bits(case):
    inspect_asm.check_vectors(ptx_of(case), loops_over(case))


@on_cuda
def test_nothing_is_spilled(case):
    inspect_asm.check_resources(compiled_mailbox(case).asm["cubin"], MAX_REGISTERS)


@write_back_not_awaited
@on_hip
def test_publishes_write_caches_back(case):
    inspect_asm.check_gcn_publishes(flow_of(case), 1)


@on_hip
def test_all_waves_meet_before_a_publish(case):
    inspect_asm.check_gcn_publish_barriers(flow_of(case))


@on_hip
def test_spins_poll_past_the_caches(case):
    inspect_asm.check_gcn_mailbox_spins(flow_of(case))


@on_hip
def test_all_waves_meet_before_their_block_is_counted(case):
    inspect_asm.check_gcn_mailbox_counts(flow_of(case))


@on_hip
def test_acquires_invalidate_caches(case):
    inspect_asm.check_gcn_acquires(flow_of(case), 1)


@on_hip
def test_loops_of_waves_move_128_bits(case):
    inspect_asm.check_gcn_vectors(flow_of(case), loops_over(case))


@on_hip
def test_waves_spill_nothing(case):
    inspect_asm.check_gcn_resources(compiled_mailbox(case).asm["amdgcn"], MAX_REGISTERS)


BARRIER = r"bar\.sync.*"
PTX_FLAWS = (
    (BARRIER, inspect_asm.check_publish_barriers, "no barrier between"),
    (BARRIER, inspect_asm.check_acquire_barriers, "no barrier between"),
    (BARRIER, lambda ptx: inspect_asm.check_mailbox_atomics(ptx, 2), "no barrier between"),
    (r"\.volatile", inspect_asm.check_mailbox_spins, "0 loops wait for a count"),
    (r"\.acquire", lambda ptx: inspect_asm.check_acquire_semantics(ptx, 1), "not an acquire"),
    (r"\.release", lambda ptx: inspect_asm.check_publish_semantics(ptx, 1), "not a release"),
    (r"\.v2", lambda ptx: inspect_asm.check_vectors(ptx, 1), "narrower than 128 bits"),
)
"""What is cut out of the assembly of a sound kernel, a check, and what it then says."""


@pytest.mark.parametrize(("flaw", "check", "message"), PTX_FLAWS, ids=[message for *_, message in PTX_FLAWS])
def test_ptx_without_it_fails(flaw, check, message):
    (case,) = [c for c in mailbox_cases_of("cuda", "_recv_kernel") if str(c) == "sm_90_recv-2"]
    broken = inspect_asm.Ptx(re.sub(flaw, "", compiled_mailbox(case).asm["ptx"]))
    with pytest.raises(AssertionError, match=message):
        check(broken)


def test_amdgcn_without_barriers_fails():
    (case,) = [c for c in mailbox_cases_of("hip", "_send_kernel") if c.world_size == 2]
    broken = inspect_asm.Flow(re.sub(r"\ts_barrier", "", compiled_mailbox(case).asm["amdgcn"]))
    for check in (inspect_asm.check_gcn_publish_barriers, inspect_asm.check_gcn_mailbox_counts):
        with pytest.raises(AssertionError, match="no barrier between"):
            check(broken)
