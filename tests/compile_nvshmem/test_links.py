import re

import pytest
from triton.runtime.errors import PTXASError

from tcomm.kernels.device_nvshmem import BINDINGS
from tcomm.kernels.nodes import NODES_MAX_REGISTERS
from tests.compile.node_cases import CUDA_TARGETS, NODE_CASES, compile_with, unlinked
from tests.compile_nvshmem import linked

LINKED_CASES = [case for case in NODE_CASES if case.world_size in (6, 8, 16)]
"""A few of those that `tests/compile` looks at: each takes some ten seconds."""


@pytest.mark.parametrize("target", CUDA_TARGETS)
@pytest.mark.parametrize("fn", linked.OF_BINDINGS, ids=lambda fn: fn.__name__)
def test_every_binding_links(fn, target):
    kernel, said = linked.link(fn, target)
    linked.check_linked(kernel.asm["ptx"])
    linked.check_resources(said, fn.__name__, NODES_MAX_REGISTERS)


def test_no_binding_is_left_out():
    compiled = [compile_with(fn, "sm_90", "i64", {})[0] for fn in linked.OF_BINDINGS]
    called = set().union(*(linked.externs_of(kernel.asm["ptx"]) for kernel in compiled))
    assert called == {binding.symbol for binding in BINDINGS}


@pytest.mark.parametrize("case", LINKED_CASES, ids=str)
def test_every_kernel_over_nodes_links_without_spills(case):
    kernel, said = linked.link_case(case)
    linked.check_linked(kernel.asm["ptx"])
    linked.check_system_scope(kernel.asm["ptx"], case.stages.publishes, case.stages.waits)
    linked.check_resources(said, case.kernel, NODES_MAX_REGISTERS)


def test_a_function_that_nvshmem_lacks_fails():
    with pytest.raises(PTXASError, match="Unresolved extern function 'nvshmem_no_such_function'"):
        linked.link(linked.unresolved_kernel, "sm_90")


def test_a_kernel_that_spills_fails():
    case = next(case for case in NODE_CASES if str(case) == "sm_90-all_reduce-bf16-2x4-sum")
    kernel, said = linked.link_case(case, max_registers=80)
    with pytest.raises(AssertionError, match="spilled"):
        linked.check_resources(said, case.kernel, NODES_MAX_REGISTERS)
    with pytest.raises(AssertionError, match="registers are too many"):
        linked.check_resources(re.sub(r"\d+ bytes spill", "0 bytes spill", said), case.kernel, 64)
    with pytest.raises(AssertionError, match="releases at system scope"):
        linked.check_system_scope(kernel.asm["ptx"].replace(".sys.", ".gpu."), 2, 3)


def test_a_kernel_that_links_nothing_fails():
    ptx = unlinked(NODE_CASES[0])
    with pytest.raises(AssertionError, match=r"not linked: .*nvshmemx_putmem_signal_nbi_block"):
        linked.check_linked(ptx)
    with pytest.raises(AssertionError, match="no nvshmemi_device_state_d"):
        linked.check_linked(ptx.replace(".extern .func", ".func"))
