"""One case: the call in a graph and eagerly, beside an empty graph node, one read and a copy, in turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from perf.gpu import kernels
from perf.gpu.plan import Case
from tcomm import VirtualRanks, reference
from tcomm.memory.virtual import Mode
from tcomm.tuning.measure import Candidate, Schedule, percentiles, time_alternating


class Device(Protocol):
    """`CudaDevice`, or what a test puts in its place."""

    device: torch.device
    copy_nbytes: int
    flush_l2: bool

    def now(self) -> float: ...
    def make_ranks(self, world: int, max_nbytes: int, mode: Mode) -> VirtualRanks: ...
    def capture(self, run: Callable[[], object], calls: int) -> Callable[[], object]: ...
    def seconds(self, run: Callable[[], object]) -> float: ...
    def synchronise(self) -> None: ...
    def release(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of a case. Times are microseconds of one call."""

    op: str
    algorithm: str
    world: int
    mode: str
    dtype: str
    nbytes: int
    graph_us_p10: float
    graph_us: float
    graph_us_p90: float
    eager_us: float
    """Of the GPU, for calls made one after another as fast as the host can."""
    host_us: float
    """Until a call returns, with nothing awaited."""
    empty_us: float
    """An empty kernel in a graph."""
    read_us: float
    """A kernel in a graph that reads all ranks' inputs once."""
    copy_gbps: float
    """Bytes read and written by torch's copy, a second."""
    bytes_moved: int
    floor_us: float
    """`bytes_moved` at the bandwidth of the copy."""
    ratio_to_floor: float
    gbps: float
    """`bytes_moved` a second, in the graph."""
    calls: int
    """In the graph."""
    replays: int
    host_calls: int
    checked: int
    """Results that were compared, whole."""
    wrong: int
    """Elements of them that were wrong."""


VERBS = {"all_reduce": "all_reduce", "reduce_scatter": "reduce_scatter_single",
         "all_gather": "all_gather_single", "all_to_all": "all_to_all_single"}  # fmt: skip
ROUNDS = 2
"""Different inputs of a case."""


class Subject:
    """The tensors of a case, its call, and whether the result is right."""

    def __init__(self, ranks: VirtualRanks, case: Case) -> None:
        self._verb: Callable[..., torch.Tensor] = getattr(ranks, VERBS[case.op])
        self._case = case
        generator = torch.Generator(device=ranks.device).manual_seed(case.nbytes + case.world)
        shape = (case.world, case.input_numel)
        self._inputs = []
        for _ in range(ROUNDS):
            values = torch.randn(shape, generator=generator, device=ranks.device, dtype=torch.float32)
            self._inputs.append(values.to(case.dtype))
        self._wanted = [self._meaning(list(inputs)) for inputs in self._inputs]
        self.x = ranks.empty(case.input_numel, dtype=case.dtype)
        self.x.copy_(self._inputs[0])
        self.out = self._verb(self.x, algorithm=case.algorithm)
        self._round = 0

    def _meaning(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        results = getattr(reference, self._case.op)(inputs)
        # Alike on all ranks: kept once.
        alike = self._case.op in {"all_reduce", "all_gather"}
        return results[0][None] if alike else torch.stack(results)

    def run(self) -> None:
        self._verb(self.x, algorithm=self._case.algorithm, out=self.out)

    def refill(self) -> None:
        """Other inputs than last time, and a result that is wrong until it is written."""
        self._round = (self._round + 1) % ROUNDS
        self.x.copy_(self._inputs[self._round])
        self.out.fill_(-1)

    def count_wrong(self) -> int:
        words = {2: torch.int16, 4: torch.int32}[self._case.dtype.itemsize]
        wanted = self._wanted[self._round].view(words)
        return int((self.out.view(words) != wanted).sum())


class HostTimes:
    """A batch of calls, and how long the host took for each."""

    def __init__(self, run: Callable[[], object], calls: int, now: Callable[[], float]) -> None:
        self._run, self._calls, self._now = run, calls, now
        self.seconds: list[float] = []

    def __call__(self) -> None:
        for _ in range(self._calls):
            start = self._now()
            self._run()
            self.seconds.append(self._now() - start)


def choose_counts(seconds: float, flush_l2: bool) -> tuple[int, int, Schedule]:
    """Calls of a graph, calls of an eager batch, and the blocks, for a call that takes so long."""
    in_graph = 1 if flush_l2 else int(np.clip(0.02 / max(seconds, 1e-9), 2, 40))
    in_batch = int(np.clip(0.05 / max(seconds, 1e-9), 2, 50))
    # 20 replays and more; of calls of many milliseconds half as many.
    schedule = (
        Schedule(blocks=4, calls=5, warmups=2) if seconds < 5e-3 else Schedule(blocks=3, calls=4, warmups=1)
    )
    return in_graph, in_batch, schedule


def measure(device: Device, ranks: VirtualRanks, case: Case) -> Row:
    """Measure a case, whose ranks have room for it."""
    subject = Subject(ranks, case)
    ranks.check()
    device.seconds(subject.run)
    in_graph, in_batch, schedule = choose_counts(device.seconds(subject.run), device.flush_l2)
    batch = HostTimes(subject.run, in_batch, device.now)
    candidates = {
        "graph": Candidate(device.capture(subject.run, in_graph), subject.refill, subject.count_wrong),
        "eager": Candidate(batch, subject.refill, subject.count_wrong),
        **_floors(device, subject.x, in_graph),
    }
    seconds, wrong = time_alternating(candidates, schedule, barrier=_nothing, timer=device.seconds)
    ranks.check()
    counts = {"graph": in_graph, "eager": in_batch, "empty": in_graph, "read": in_graph, "copy": 1}
    micros: dict[str, Any] = {name: seconds[name] * 1e6 / counts[name] for name in candidates}
    graph = percentiles(micros["graph"])
    copy_gbps = 2 * device.copy_nbytes / percentiles(micros["copy"]).median_us / 1e3
    floor_us = case.bytes_moved / copy_gbps / 1e3
    checked = 2 * schedule.blocks * (schedule.calls + schedule.warmups)
    return Row(
        case.op, case.algorithm, case.world, case.mode, str(case.dtype).removeprefix("torch."), case.nbytes,
        graph.p10_us, graph.median_us, graph.p90_us,
        eager_us=percentiles(micros["eager"]).median_us,
        host_us=percentiles(np.array(batch.seconds) * 1e6).median_us,
        empty_us=percentiles(micros["empty"]).median_us, read_us=percentiles(micros["read"]).median_us,
        copy_gbps=copy_gbps, bytes_moved=case.bytes_moved, floor_us=floor_us,
        ratio_to_floor=graph.median_us / floor_us, gbps=case.bytes_moved / graph.median_us / 1e3,
        calls=in_graph, replays=len(seconds["graph"]), host_calls=len(batch.seconds),
        checked=checked, wrong=wrong["graph"] + wrong["eager"],
    )  # fmt: skip


def _floors(device: Device, x: torch.Tensor, in_graph: int) -> dict[str, Candidate]:
    """What the call is compared with."""
    sink = torch.zeros(kernels.PROGRAMS, dtype=torch.int32, device=device.device)
    words = x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,)).view(torch.int32)
    source = torch.zeros(device.copy_nbytes // 4, dtype=torch.int32, device=device.device)
    target = torch.empty_like(source)
    runs = {
        "empty": device.capture(lambda: kernels.nothing(sink), in_graph),
        "read": device.capture(lambda: kernels.read(words, sink), in_graph),
        "copy": device.capture(lambda: target.copy_(source), 1),
    }
    return {name: Candidate(run, _nothing, _nothing_wrong) for name, run in runs.items()}


def _nothing() -> None:
    pass


def _nothing_wrong() -> int:
    return 0
