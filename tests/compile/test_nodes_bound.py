"""Compiled launches over several nodes, down to a driver and an NVSHMEM that only write down.

What is linked is left out here; `tests/compile_nvshmem` has it.
"""

import pathlib

import pytest
import torch
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

from tcomm.errors import CapabilityError
from tcomm.kernels import nodes, nvshmem_modules
from tcomm.kernels.bound import Rebound
from tcomm.kernels.hierarchical import compile_nodes_ahead, hierarchical_all_gather, hierarchical_all_reduce
from tcomm.memory import nvshmem
from tcomm.memory.nvshmem_bitcode import Bitcode
from tests.compile.cases import discovered_kernels
from tests.compile.node_cases import NODE_KERNELS
from tests.compile.node_launches import NODES, PES, RANK, WORLD, Library
from tests.compile.test_bound import FakeDriver, FakeLauncher, driver  # noqa: F401 - a fixture

BITCODE = Bitcode(pathlib.Path("libnvshmem_device_sm_90.bc"), "3.8.0")


@pytest.fixture
def unlinked(driver, monkeypatch):  # noqa: F811
    """Kernels whose calls of NVSHMEM stay unresolved, and are taken for linked."""
    monkeypatch.setattr(nvshmem, "_use", nvshmem._Use())
    monkeypatch.setattr(nodes, "_modules", {})
    monkeypatch.setattr(nodes, "why_not_linked", str)
    monkeypatch.setattr(Bitcode, "link_options", {})
    monkeypatch.setattr(CUDABackend, "make_cubin", lambda *_, **__: b"\x7fELF")
    monkeypatch.setattr(nvshmem_modules, "DEVICE_STATE", ".version")
    load = FakeDriver.load_binary
    monkeypatch.setattr(
        FakeDriver, "load_binary", lambda *args: (900 + len(args[0].loaded), *load(*args)[1:])
    )
    return driver


@pytest.fixture
def launched(unlinked):
    return FakeLauncher.launched


def reduce(arena, numel=1000, dtype=torch.bfloat16, **kwargs):
    x, out = torch.ones(numel, dtype=dtype), torch.ones(numel, dtype=dtype)
    hierarchical_all_reduce(x, arena, NODES, out=out, pes=PES, timeout=2.5, **kwargs)
    return x, out


def gather(arena, numel=1000, dtype=torch.bfloat16):
    x, out = torch.ones(numel, dtype=dtype), torch.ones(WORLD, numel, dtype=dtype)
    hierarchical_all_gather(x, arena, NODES, out=out, pes=PES, timeout=2.5)
    return x, out


@pytest.mark.parametrize("call", [reduce, gather])
def test_every_argument_is_where_the_kernel_has_it(launched, call):
    arena = Library().arena(BITCODE)
    x, out = call(arena)
    (found,) = launched
    args, local = found.args, [arena.staging.buffer.local.data_ptr(), arena.control.local.data_ptr()]
    assert (args["x_ptr"], args["out_ptr"]) == (x.data_ptr(), out.data_ptr())
    tables = [torch.frombuffer((args_at(args[n])), dtype=torch.int64) for n in ("staging_ptrs", "pad_ptrs")]
    for table, address in zip(tables, local, strict=True):
        assert table.tolist() == [address, address, 0, 0]
    assert torch.frombuffer(args_at(args["pes_ptr"]), dtype=torch.int64).tolist() == list(PES)
    assert (args["rank"], args["WORLD"], args["NODES"], args["LANES"]) == (RANK, WORLD, NODES, 4)
    assert (args["numel"], args["budget"]) == (1000, 2_500_000_000)
    assert args.get("part_stride", 1000) == 1000
    assert 0 <= args["signature"] < 1 << 32
    assert args["HALF_BYTES"] == arena.staging.layout.half_bytes
    assert found.grid == (1, 1, 1)
    assert (found.metadata.num_warps, found.metadata.maxnreg) == (8, nodes.NODES_MAX_REGISTERS)
    assert found.metadata.launch_cooperative_grid is True


def args_at(address):
    import ctypes

    return (ctypes.c_int64 * WORLD).from_address(address)


@pytest.mark.parametrize("launcher", [hierarchical_all_reduce, hierarchical_all_gather])
def test_a_bound_call_is_a_launch_with_other_addresses(launched, unlinked, monkeypatch, launcher):
    library = Library()
    arena = library.arena(BITCODE)
    rows = WORLD if launcher is hierarchical_all_gather else 1
    run = Rebound(lambda x, out, s: launcher(x, arena, NODES, out=out, pes=PES, timeout=s))
    shape = (rows, 1008) if rows > 1 else (1008,)
    tensors = [(torch.ones(1008), torch.ones(shape)) for _ in range(2)]
    run(*tensors[0], 2.5)
    monkeypatch.setattr(JITFunction, "run", None)
    run(*tensors[1], 1.0)
    first, second = launched
    assert [(f.args["x_ptr"], f.args["out_ptr"]) for f in launched] == [
        (x.data_ptr(), out.data_ptr()) for x, out in tensors
    ]
    assert (first.args["budget"], second.args["budget"]) == (2_500_000_000, 1_000_000_000)
    same = first.args.keys() - {"x_ptr", "out_ptr", "budget"}
    assert {n: first.args[n] for n in same} == {n: second.args[n] for n in same}
    assert arena.channel.calls == 2
    assert len(unlinked.loaded) == 1
    assert library.log == ["initialise 900"]


def test_a_module_is_initialised_between_loading_and_launch_and_once_in_the_life_of_nvshmem(launched):
    library = Library()
    first, second = library.arena(BITCODE), library.arena(BITCODE)
    for arena in (first, second, first):
        reduce(arena)
        gather(arena)
    assert library.log == ["initialise 900", "initialise 901"]
    first.close()
    assert library.log[2:] == ["free"]
    reduce(second)
    second.close()
    assert library.log[3:] == ["free", "finalise 900", "finalise 901", "finalize"]
    # Loaded modules outlive NVSHMEM, which has to be told of them again.
    third = library.arena(BITCODE)
    reduce(third)
    assert library.log[7:] == ["initialise 900"]
    third.close()


def test_what_nvshmem_refuses_is_not_launched(launched):
    library = Library()
    library.library.bindings.cumodule_init = lambda module: 7
    with pytest.raises(CapabilityError, match=r"cannot initialise the module of .*status 7"):
        reduce(library.arena(BITCODE))
    assert launched == []


def test_only_what_is_ready_can_be_captured(launched, monkeypatch):
    library = Library()
    arena = library.arena(BITCODE)

    def refuse(what):
        raise CapabilityError(f"{what}; call prepare")

    reduce(arena)
    monkeypatch.setattr(arena.runtime, "refuse_in_capture", refuse, raising=False)
    for numel in (1, 16, 1000, 50_000):
        reduce(arena, numel)
    with pytest.raises(
        CapabilityError, match=r"all_gather_kernel has to be compiled and loaded; call prepare"
    ):
        gather(arena)
    nodes._modules[id(library.library.bindings)].finalise()
    with pytest.raises(
        CapabilityError, match=r"all_reduce_kernel has to be compiled and loaded; call prepare"
    ):
        reduce(arena)
    other = Library().arena(BITCODE)
    monkeypatch.setattr(other.runtime, "refuse_in_capture", refuse, raising=False)
    with pytest.raises(CapabilityError, match="tables of addresses have to be made; call prepare"):
        reduce(other)
    assert len(launched) == 5


def test_ahead_everything_is_loaded_and_nothing_launched(launched, unlinked):
    library = Library()
    arena = library.arena(BITCODE)
    compile_nodes_ahead(arena, NODES, PES, [torch.bfloat16, torch.uint8], ["sum", "max"])
    # uint8 is gathered as wider words, as bf16 is, and not reduced.
    assert launched == []
    assert len(library.log) == len(unlinked.loaded)
    known = list(unlinked.loaded)
    assert sum("all_reduce" in name for name in known) == 2
    for numel in (1, 16, 37, 4096, 40_000):
        reduce(arena, numel)
        reduce(arena, numel, op="max")
        gather(arena, numel)
    assert unlinked.loaded == known
    assert arena.channel.calls == len(launched) == 15


def test_memory_of_torch_and_an_old_triton_are_refused(launched, monkeypatch):
    arena = Library().arena(BITCODE)
    monkeypatch.setattr(nodes, "why_not_linked", lambda: "the LLVM of Triton 3.6.0 is old")
    with pytest.raises(CapabilityError, match=r"Triton 3\.6\.0 is old"):
        reduce(arena)
    arena.nvshmem = None
    with pytest.raises(CapabilityError, match="needs pages and staging in NVSHMEM's memory"):
        reduce(arena)
    assert arena.channel.calls == 0


@pytest.mark.parametrize("name", NODE_KERNELS)
def test_a_kernel_is_the_same_for_any_number(name):
    parameters = [p for p in discovered_kernels()[name].params if not p.is_constexpr]
    numbers = [p for p in parameters if not p.name.endswith(("_ptr", "_ptrs"))]
    assert numbers
    assert [p.name for p in numbers if not p.do_not_specialize] == []
