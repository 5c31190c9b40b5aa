"""Compiled launches, bound once: real kernels and Triton's own ways, over a driver that only writes down."""

import collections
import gc
import itertools
import types
import weakref

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tcomm import VirtualRanks
from tcomm.errors import CapabilityError
from tcomm.kernels import all_reduce, bound, partition, warmup
from tcomm.memory.base import LaunchPart
from tcomm.memory.runtime import HostRuntime
from tests.compile.cases import PROTOCOLS, discovered_kernels
from tests.virtual_worlds import ALGORITHMS, CASES, call, length_of

WORLD = 4


class FakeLauncher:
    """Called as Triton calls its launcher, with the arguments of `CompiledKernel.run`."""

    launched = ()

    def __init__(self, src, metadata):
        self.src, self.metadata = src, metadata

    def __call__(
        self, grid_x, grid_y, grid_z, stream, function, packed, launch_metadata, enter_hook, exit_hook, *args
    ):
        names = self.src.fn.arg_names
        assert len(args) == len(names) == len(self.src.signature)
        assert packed[0] == self.metadata.num_warps
        assert (launch_metadata, enter_hook, exit_hook) == (None, None, None)
        self._check_types(args)
        given = {
            name: a.data_ptr() if hasattr(a, "data_ptr") else a for name, a in zip(names, args, strict=True)
        }
        self.launched.append(
            types.SimpleNamespace(
                name=self.src.fn.__name__, grid=(grid_x, grid_y, grid_z), stream=stream, function=function,
                metadata=self.metadata, args=given,
            )
        )  # fmt: skip

    def _check_types(self, args):
        limits = {"i32": 1 << 31, "i64": 1 << 63}
        for (name, kind), value in zip(self.src.signature.items(), args, strict=True):
            if kind.startswith("*"):
                assert isinstance(value, (int, torch.Tensor)), name
            elif kind != "constexpr":
                assert isinstance(value, int), name
                assert -limits[kind] <= value < limits[kind], name


class FakeDriver:
    """One H100 that loads and launches nothing."""

    launcher_cls = FakeLauncher

    def __init__(self):
        self.utils = self
        self.loaded = []

    def load_binary(self, name, kernel, shared, device):
        self.loaded.append(name)
        assert kernel[:4] == b"\x7fELF"
        return object(), 1000 + len(self.loaded), 128, 0, 1024

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def driver(monkeypatch):
    fake = FakeDriver()
    monkeypatch.setattr(triton.runtime.driver, "_active", fake)
    monkeypatch.setattr(FakeLauncher, "launched", [])
    monkeypatch.setattr(bound, "_compiled", {})
    for kernel in discovered_kernels().values():
        monkeypatch.setattr(kernel, "device_caches", collections.defaultdict(kernel.create_binder))
    monkeypatch.setattr(partition, "_tables", {})
    make_table = partition._make_table
    monkeypatch.setattr(
        partition, "_make_table", lambda parts, size, _: make_table(parts, size, torch.device("cpu"))
    )
    yield fake
    # They would be unloaded whenever they are collected, by a driver that is not there.
    for kernel in bound._compiled.values():
        kernel.module = None


@pytest.fixture
def launched(driver):
    return FakeLauncher.launched


def make(world=WORLD, mode="grid"):
    """Virtual ranks that take host memory for that of a GPU."""
    ranks = VirtualRanks(world, "cpu", staging_bytes=1 << 20, mode=mode, timeout=2.5)
    ranks.arena.device = torch.device("cuda", 0)
    if mode == "streams":
        streams = [types.SimpleNamespace(cuda_stream=100 + rank) for rank in range(world)]
        ranks.arena.launch_parts = tuple(LaunchPart(rank, 1, stream) for rank, stream in enumerate(streams))
    return ranks


def rows(ranks, verb, numel=1000, dtype=torch.bfloat16):
    return ranks.empty(length_of(verb, numel, ranks.world_size), dtype=dtype)


@pytest.mark.parametrize(("verb", "algorithm"), CASES)
def test_a_bound_call_is_a_launch_with_other_addresses(launched, driver, monkeypatch, verb, algorithm):
    ranks = make()
    x, y = rows(ranks, verb), rows(ranks, verb)
    call(ranks, verb, algorithm, x, root=1)

    def refuse(*_, **__):
        raise AssertionError("Triton looked every argument over again")

    monkeypatch.setattr(JITFunction, "run", refuse)
    out = call(ranks, verb, algorithm, y, root=1, timeout=None)
    first, second = launched
    assert len(driver.loaded) == 1
    assert second.function == first.function == 1001
    assert first.args["x_ptr"] == x.data_ptr()
    assert (second.args["x_ptr"], second.args["out_ptr"]) == (y.data_ptr(), out.data_ptr())
    assert (first.args["budget"], second.args["budget"]) == (2_500_000_000, 1 << 62)
    same = first.args.keys() - {"x_ptr", "out_ptr", "budget"}
    assert {name: first.args[name] for name in same} == {name: second.args[name] for name in same}


@pytest.mark.parametrize(("verb", "algorithm"), CASES)
def test_every_argument_is_where_the_kernel_has_it(launched, verb, algorithm):
    ranks = make()
    x = rows(ranks, verb)
    out = call(ranks, verb, algorithm, x, root=1)
    (found,) = launched
    args, arena = found.args, ranks.arena
    assert found.grid == (1, WORLD, 1)
    assert found.stream == 0
    assert (args["x_ptr"], args["out_ptr"]) == (x.data_ptr(), out.data_ptr())
    assert (args["x_stride"], args["out_stride"]) == (x.stride(0), out.stride(0))
    assert args["staging_ptrs"] == arena.staging.buffer.table.data_ptr()
    assert args["pad_ptrs"] == arena.control.table.data_ptr()
    assert (args["rank"], args["WORLD"], args["LANES"]) == (0, WORLD, 4)
    assert args["LANE_HALF_BYTES"] == arena.staging.layout.lane_half_bytes
    assert args["VIRTUAL"] is True
    assert 0 <= args["signature"] < 1 << 32
    if verb == "all_reduce":
        assert args["numel"] == 1000


@pytest.mark.parametrize(("verb", "algorithm"), CASES)
def test_kernels_are_compiled_for_256_threads_and_few_registers(launched, verb, algorithm):
    ranks = make()
    call(ranks, verb, algorithm, rows(ranks, verb))
    metadata = launched[0].metadata
    assert (metadata.num_warps, metadata.maxnreg) == (8, 128)
    assert metadata.launch_cooperative_grid is True
    assert getattr(metadata, "launch_pdl", False) is False
    assert metadata.global_scratch_size == 0


def test_a_long_message_has_as_many_blocks_a_rank_as_fit_and_never_more(launched):
    ranks = make()
    for limit, numel, blocks in (
        (32, 1, 1),
        (32, 2048, 1),
        (32, 2049, 2),
        (32, 32 * 2048, 32),
        (32, 100 * 1024, 32),
        (5, 100 * 1024, 5),
    ):
        ranks.arena.max_blocks = limit
        ranks._plans.clear()
        call(ranks, "all_reduce", "two_shot", rows(ranks, "all_reduce", numel))
        assert launched[-1].grid == (blocks, WORLD, 1), numel


def test_launches_of_their_own_go_to_their_streams_and_are_not_cooperative(launched, driver):
    ranks = make(mode="streams")
    for _ in range(2):
        call(ranks, "all_reduce", "two_shot", rows(ranks, "all_reduce"))
    assert [(found.args["rank"], found.stream, found.grid) for found in launched] == [
        (rank, 100 + rank, (1, 1, 1)) for rank in range(WORLD)
    ] * 2
    assert {found.metadata.launch_cooperative_grid for found in launched} == {False}
    assert len(driver.loaded) == 1


def test_other_shapes_compile_nothing(launched, driver):
    for verb, algorithms in ALGORITHMS.items():
        for algorithm in algorithms:
            ranks = make()
            # Parts that begin at a whole vector, or not: the table says so, and it is compiled in.
            call(ranks, verb, algorithm, rows(ranks, verb, 32))
            call(ranks, verb, algorithm, rows(ranks, verb, 37))
            known = len(driver.loaded)
            for numel in (1, 16, 1024, 16_384, 40_001):
                call(ranks, verb, algorithm, rows(ranks, verb, numel))
            assert len(driver.loaded) == known, (verb, algorithm)
    assert len({found.args["signature"] >> 31 for found in launched}) == 2


def real_rank(world=2):
    """A rank that is alone in its process, as to kernels."""
    ranks = make(world)
    ranks.arena.is_virtual, ranks.arena.launch_parts = False, (LaunchPart(0),)
    return ranks.arena


@pytest.mark.parametrize("algorithm", all_reduce.LAUNCHERS)
def test_tensors_that_begin_elsewhere_are_compiled_apart(launched, driver, algorithm):
    arena = real_rank()
    memory = torch.zeros(2, 1008)
    launcher = all_reduce.LAUNCHERS[algorithm]
    run = bound.Rebound(lambda x, out, seconds: launcher(x, arena, out=out, timeout=seconds))
    starts = [(0, 0), (1, 0), (0, 1), (1, 1)]
    for _, (a, b) in itertools.product(range(2), starts):
        x, out = memory[0, a : a + 1000], memory[1, b : b + 1000]
        run(x, out, 1.0)
        assert (launched[-1].args["x_ptr"], launched[-1].args["out_ptr"]) == (x.data_ptr(), out.data_ptr())
        assert launched[-1].grid[1] == 1
    functions = [found.function for found in launched]
    assert functions[:4] == functions[4:]
    assert len(set(functions)) == len(driver.loaded) == 4


def test_pieces_are_bound_together(launched, monkeypatch):
    ranks = make()
    numel = 3 * ranks.arena.staging.layout.slot_bytes // 2 + 8
    x, y = (rows(ranks, "all_reduce", numel) for _ in range(2))
    call(ranks, "all_reduce", "one_shot_push", x)
    first = [found.args["x_ptr"] - x.data_ptr() for found in launched]
    launched.clear()
    monkeypatch.setattr(JITFunction, "run", None)
    call(ranks, "all_reduce", "one_shot_push", y)
    assert [found.args["x_ptr"] - y.data_ptr() for found in launched] == first
    assert len(first) == 4
    assert sum(found.args["numel"] for found in launched) == numel


def test_only_what_is_compiled_can_be_captured(launched, monkeypatch):
    ranks = make()

    def refuse(what):
        raise CapabilityError(f"{what}; call prepare")

    call(ranks, "all_reduce", "two_shot", rows(ranks, "all_reduce", 1000))
    monkeypatch.setattr(ranks.arena.runtime, "refuse_in_capture", refuse)
    for numel in (1000, 1, 50_000, *range(3, 20)):
        call(ranks, "all_reduce", "two_shot", rows(ranks, "all_reduce", numel))
    count = len(launched)
    with pytest.raises(
        CapabilityError, match=r"_one_shot_pull_all_reduce_kernel has to be compiled.*prepare"
    ):
        call(ranks, "all_reduce", "one_shot_pull", rows(ranks, "all_reduce", 1000))
    assert len(launched) == count


def test_a_barrier_has_no_tensors(launched):
    ranks = make()
    ranks.barrier()
    (found,) = launched
    assert found.grid == (1, WORLD, 1)
    assert "x_ptr" not in found.args
    assert found.args["pad_ptrs"] == ranks.arena.control.table.data_ptr()


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_kernel_is_the_same_for_any_number(name):
    """What is bound is found by types and alignment alone: a number compiled in would be another call's."""
    parameters = [p for p in discovered_kernels()[name].params if not p.is_constexpr]
    numbers = [p for p in parameters if not p.name.endswith(("_ptr", "_ptrs"))]
    assert numbers
    assert [p.name for p in numbers if not p.do_not_specialize] == []


def test_what_prepare_compiles_is_all_that_calls_need(launched, driver, monkeypatch):
    stand_in = warmup._stand_in

    def on_host(arena, numel, dtype):
        arena.device = torch.device("cpu")
        x = stand_in(arena, numel, dtype)
        arena.device = torch.device("cuda", 0)
        return x

    monkeypatch.setattr(warmup, "_stand_in", on_host)
    ranks = VirtualRanks(WORLD, "cpu", staging_bytes=16 << 20, timeout=2.5)
    ranks.arena.device = torch.device("cuda", 0)
    warmup.compile_ahead(ranks.arena, [torch.bfloat16], ["sum"])
    assert launched == []
    loaded = len(driver.loaded)
    assert loaded > 10
    widths = set()
    for verb, algorithm in CASES:
        for numel in (1, 1000, 700_000):
            call(ranks, verb, algorithm, rows(ranks, verb, numel), root=1)
            if algorithm != "one_shot_ll":
                widths.add(launched[-1].args["BLOCK"] * 2 // 4096)
    assert len(driver.loaded) == loaded
    # Both narrow and wide tiles were among them.
    assert widths == {1, 4}
    call(ranks, "all_reduce", "two_shot", rows(ranks, "all_reduce", 8, torch.float32), root=1)
    assert len(driver.loaded) == loaded + 1


def test_what_a_graph_uses_outlives_the_ranks_and_nothing_else_does(launched, monkeypatch):
    monkeypatch.setattr(bound, "_in_graphs", {})
    captured, seen = [0], []
    monkeypatch.setattr(HostRuntime, "capture_id", lambda self, stream: captured[0])
    for number in (0, 7):
        ranks = make()
        x = rows(ranks, "all_gather_single")
        captured[0] = 0
        call(ranks, "all_gather_single", "pull", x)
        captured[0] = number
        call(ranks, "all_gather_single", "pull", x)
        arena = ranks.arena
        kept = [arena.pages, arena.records, arena.staging.buffer.table, arena.staging.buffer.local]
        seen.append([weakref.ref(tensor) for tensor in kept])
        del ranks, arena, kept
    gc.collect()
    eager, graph = seen
    assert [reference() is None for reference in eager[:3]] == [True] * 3
    assert [reference() is not None for reference in graph] == [True] * 4
