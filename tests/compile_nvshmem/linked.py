"""What is linked, and what must hold of it. Every `check_` raises AssertionError."""

import functools
import re

import triton
import triton.language as tl

from tcomm.kernels import device_nvshmem
from tcomm.kernels.device_nvshmem import (
    CMP_GE,
    SIGNAL_ADD,
    SIGNAL_SET,
    Binding,
    barrier,
    fence,
    get,
    my_pe,
    n_pes,
    ptr,
    put,
    put_nbi,
    put_signal,
    put_signal_nbi,
    quiet,
    signal_op,
    signal_wait_until,
)
from tcomm.kernels.nvshmem_modules import DEVICE_STATE
from tcomm.memory.nvshmem_bitcode import find_bitcode
from tests.compile.cases import discovered_kernels
from tests.compile.node_cases import compile_with, constants_of

OF_THE_DRIVER = {"vprintf", "__assertfail", "malloc", "free", "__nvvm_reflect"}
"""Functions that a module may leave to the driver."""


# Three kernels, because the time that ptxas takes grows faster than what is inlined.
@triton.jit
def copying_kernel(x_ptr, out_ptr, numel):
    address = x_ptr.to(tl.int64)
    pe = (my_pe() + 1) % n_pes()
    put(address, address, numel, pe)
    put_nbi(address, address, numel, pe)
    get(address, address, numel, pe)


@triton.jit
def signalling_kernel(x_ptr, out_ptr, numel):
    address = x_ptr.to(tl.int64)
    put_signal(address, address, numel, address + 64, 1, SIGNAL_SET, 1)
    put_signal_nbi(address, address, numel, address + 64, 1, SIGNAL_SET, 1)
    signal_op(address + 64, 1, SIGNAL_ADD, 1)


@triton.jit
def waiting_kernel(x_ptr, out_ptr, numel):
    address = x_ptr.to(tl.int64)
    fence()
    quiet()
    barrier()
    seen = signal_wait_until(address + 64, CMP_GE, 2)
    tl.store(out_ptr, seen + ptr(address, 1))


OF_BINDINGS = (copying_kernel, signalling_kernel, waiting_kernel)

_no_such_function = device_nvshmem._extern(Binding("nothing", "nvshmem_no_such_function", ("int",)))


@triton.jit
def unresolved_kernel(x_ptr, out_ptr, numel):
    quiet()
    _no_such_function(numel)


@functools.cache
def bitcode_of(target):
    return find_bitcode(int(target.removeprefix("sm_"))).path


def link(fn, target, dtype="i64", constants=None, **changes):
    """The kernel with NVSHMEM, and what ptxas says of it."""
    return compile_with(fn, target, dtype, constants or {}, bitcode_of(target), **changes)


def link_case(case, **changes):
    return link(discovered_kernels()[case.kernel], case.target, case.dtype, constants_of(case), **changes)


def externs_of(ptx):
    """Functions that the module calls and does not define."""
    return set(re.findall(r"^\.extern \.func\s+(?:\([^)]*\)\s*)?([\w$]+)", ptx, re.MULTILINE))


def check_linked(ptx):
    missing = externs_of(ptx) - OF_THE_DRIVER
    assert not missing, f"not linked: {sorted(missing)}"
    state = re.search(rf"^\.visible \.const \S+ \S+ \.b8 {DEVICE_STATE}\[", ptx, re.MULTILINE)
    assert state, f"no {DEVICE_STATE}, which NVSHMEM fills in by its name"


def check_system_scope(ptx, publishes, waits):
    """What mates are told, and what is awaited, is at system scope after linking, too."""
    atomics = [set(found.split(".")) for found in re.findall(r"\batom\.[\w.:]+", ptx)]
    released = sum({"release", "sys", "exch", "b64"} <= parts for parts in atomics)
    acquired = sum({"acquire", "sys", "add"} <= parts for parts in atomics)
    assert released >= publishes, f"{released} releases at system scope, not {publishes}"
    assert acquired >= waits, f"{acquired} acquires at system scope, not {waits}"


def check_resources(said, name, max_registers):
    """Neither the kernel nor a function of NVSHMEM spills, by what ptxas says."""
    own = said[said.index(f"Function properties for {name}") :]
    spilled = [int(found) for found in re.findall(r"(\d+) bytes spill", said)]
    assert spilled, "ptxas says nothing of spills"
    assert not any(spilled), f"spilled: {spilled} bytes"
    registers = int(re.search(r"Used (\d+) registers", own)[1])
    assert registers <= max_registers, f"{registers} registers are too many"
