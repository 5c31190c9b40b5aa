import functools

import pytest

from tests.compile import broken, inspect_asm
from tests.compile.cases import MAX_REGISTERS, TARGETS, compile_kernel, write_back_not_awaited

PTX_CHECKS = {
    "publish semantics": lambda ptx: inspect_asm.check_publish_semantics(ptx, 1),
    "publish barriers": inspect_asm.check_publish_barriers,
    "acquire semantics": lambda ptx: inspect_asm.check_acquire_semantics(ptx, 1),
    "acquire barriers": inspect_asm.check_acquire_barriers,
    "loads follow acquires": inspect_asm.check_loads_follow_acquires,
    "atomics": lambda ptx: inspect_asm.check_atomics(ptx, 1),
    "spins": lambda ptx: inspect_asm.check_spins(ptx, 1, 0),
    "deadlines": lambda ptx: inspect_asm.check_deadlines(ptx, 1),
    "vectors": lambda ptx: inspect_asm.check_vectors(ptx, 2),
}
PTX_FLAWS = (
    ({"PUBLISH_SEM": "relaxed"}, "publish semantics", "not a release"),
    ({"PUBLISH_SCOPE": "gpu"}, "publish semantics", "not a release at system scope"),
    ({"PUBLISH_SEM": "relaxed", "PUBLISH_BARRIER": False}, "publish barriers", "no barrier between st"),
    ({"ACQUIRE_SEM": "relaxed"}, "acquire semantics", "not an acquire"),
    ({"ACQUIRE_SCOPE": "gpu"}, "acquire semantics", "not an acquire at system scope"),
    ({"ACQUIRE_SEM": "relaxed", "ACQUIRE_BARRIER": False}, "acquire barriers", "no barrier between"),
    ({"LOAD_LATE": False}, "loads follow acquires", "has no acquire before it"),
    ({"DONE_SCOPE": "sys"}, "atomics", "atomics are"),
    ({"POLL": "plain"}, "spins", "loops wait for words"),
    ({"CLOCK": "none"}, "deadlines", "does not read the clock"),
    ({"CLOCK": "no abort"}, "deadlines", "no abort word"),
    ({"ALIGNED": False}, "vectors", "narrower than 128 bits"),
)
"""Relaxed where a barrier is missing: Triton 3.9 puts one before a release and after an acquire by itself."""
GCN_CHECKS = {
    "publishes": lambda flow: inspect_asm.check_gcn_publishes(flow, 1),
    "publish barriers": inspect_asm.check_gcn_publish_barriers,
    "spins": lambda flow: inspect_asm.check_gcn_spins(flow, 1, 0),
    "acquires": lambda flow: inspect_asm.check_gcn_acquires(flow, 1),
    "vectors": lambda flow: inspect_asm.check_gcn_vectors(flow, 2),
}
GCN_FLAWS = (
    ({"PUBLISH_SEM": "relaxed"}, "publishes", "before global_atomic_swap"),
    ({"PUBLISH_SCOPE": "gpu"}, "publishes", "not at system scope"),
    ({"PUBLISH_SEM": "relaxed", "PUBLISH_BARRIER": False}, "publish barriers", "no barrier between"),
    ({"POLL": "volatile"}, "spins", "loops wait for words"),
    ({"POLL": "atomic gpu"}, "spins", "through a cache"),
    ({"ACQUIRE_SEM": "relaxed"}, "acquires", "after global_"),
    ({"ALIGNED": False}, "vectors", "narrower than 128 bits"),
)
ARITHMETIC_FLAWS = ("divided", "maximum", "fused", "flushed")


def kernel(fn, target, constants, max_registers=MAX_REGISTERS):
    return compile_kernel(fn, TARGETS[target], "fp32", constants, max_registers=max_registers)


@functools.cache
def model_on(target, changes):
    poll = {} if target != "gfx942" else {"POLL": "atomic", "CLOCK": "none"}
    return kernel(broken.model_kernel, target, broken.SOUND | poll | dict(changes)).asm


def model_ptx(changes):
    return inspect_asm.Ptx(model_on("sm_90", tuple(changes.items()))["ptx"])


def model_gcn(changes):
    return inspect_asm.Flow(model_on("gfx942", tuple(changes.items()))["amdgcn"])


def lanes_ptx(**changes):
    constants = broken.SOUND_LANES | changes
    return inspect_asm.Ptx(kernel(broken.lanes_kernel, "sm_90", constants).asm["ptx"])


def lanes_gcn(**changes):
    constants = broken.SOUND_LANES | changes
    return inspect_asm.Flow(kernel(broken.lanes_kernel, "gfx942", constants).asm["amdgcn"])


def arithmetic_ptx(**changes):
    constants = broken.SOUND_ARITHMETIC | changes
    return inspect_asm.Ptx(kernel(broken.arithmetic_kernel, "sm_90", constants).asm["ptx"])


@pytest.mark.parametrize("check", PTX_CHECKS)
def test_sound_ptx_passes(check):
    PTX_CHECKS[check](model_ptx({}))


@pytest.mark.parametrize(("changes", "check", "message"), PTX_FLAWS, ids=str)
def test_broken_ptx_fails(changes, check, message):
    with pytest.raises(AssertionError, match=message):
        PTX_CHECKS[check](model_ptx(changes))


@pytest.mark.parametrize(
    "check",
    [pytest.param("publishes", marks=write_back_not_awaited), *sorted(GCN_CHECKS.keys() - {"publishes"})],
)
def test_sound_amdgcn_passes(check):
    GCN_CHECKS[check](model_gcn({}))


@pytest.mark.parametrize(("changes", "check", "message"), GCN_FLAWS, ids=str)
def test_broken_amdgcn_fails(changes, check, message):
    with pytest.raises(AssertionError, match=message):
        GCN_CHECKS[check](model_gcn(changes))


def test_whole_lanes_pass():
    inspect_asm.check_lanes(lanes_ptx(), 2)
    inspect_asm.check_gcn_lanes(lanes_gcn(), 2)


def test_split_lanes_fail():
    with pytest.raises(AssertionError, match="in parts"):
        inspect_asm.check_lanes(lanes_ptx(SPLIT=True), 2)
    with pytest.raises(AssertionError, match="in parts"):
        inspect_asm.check_gcn_lanes(lanes_gcn(SPLIT=True), 2)


def test_lanes_read_through_a_cache_fail():
    with pytest.raises(AssertionError, match="through a cache"):
        inspect_asm.check_lanes(lanes_ptx(CACHED=True), 2)


def test_sound_arithmetic_passes():
    inspect_asm.check_arithmetic(arithmetic_ptx())


@pytest.mark.parametrize("sort", ARITHMETIC_FLAWS)
def test_other_arithmetic_fails(sort):
    with pytest.raises(AssertionError, match="arithmetic"):
        inspect_asm.check_arithmetic(arithmetic_ptx(SORT=sort))


def test_spills_fail():
    cubin = kernel(broken.crowded_kernel, "sm_90", {"BLOCK": 65536}).asm["cubin"]
    with pytest.raises(AssertionError, match="spilled"):
        inspect_asm.check_resources(cubin, MAX_REGISTERS)
    asm = kernel(broken.crowded_kernel, "gfx942", {"BLOCK": 262144}).asm["amdgcn"]
    with pytest.raises(AssertionError, match="spills"):
        inspect_asm.check_gcn_resources(asm, MAX_REGISTERS)


def test_too_many_registers_fail():
    cubin = kernel(broken.crowded_kernel, "sm_90", {"BLOCK": 32768}, max_registers=255).asm["cubin"]
    with pytest.raises(AssertionError, match="too many"):
        inspect_asm.check_resources(cubin, MAX_REGISTERS)
    asm = kernel(broken.crowded_kernel, "gfx942", {"BLOCK": 65536}).asm["amdgcn"]
    with pytest.raises(AssertionError, match="too many"):
        inspect_asm.check_gcn_resources(asm, MAX_REGISTERS)
