"""`tcomm bench expert_moves`: a layer's experts from one map to the next, against one batch of transfers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tcomm.cli.bench import _gather, _gather_cores
from tcomm.cli.workers import run_ranks
from tcomm.eplb.migration import Copy, LayerMoves, migration
from tcomm.eplb.moving.making import make_mover
from tcomm.eplb.plans import make_plan
from tcomm.eplb.shapes import IntArray, Shape
from tcomm.errors import ConfigError
from tcomm.groups.communicator import Communicator
from tcomm.tuning.measure import Candidate, Schedule, percentiles, slowest, time_alternating

__all__ = ["MOVE_HEADER", "MoveRequest", "check_move_request", "move_columns", "run_move_bench"]

_SETUP_SECONDS = 120.0
_REDUNDANT_PER_RANK = 4


@dataclasses.dataclass(frozen=True)
class MoveRequest:
    """What to measure."""

    ranks: int = 4
    """Processes on this machine."""
    sizes: tuple[int, ...] = (1 << 20,)
    """Bytes of an expert."""
    num_experts: int = 64
    """Of the layer; each rank has four slots more than its share."""
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    """How often."""
    pin: bool = False
    """Give each rank one core."""

    @property
    def shape(self) -> Shape:
        """Experts, slots and ranks."""
        num_slots = self.num_experts + _REDUNDANT_PER_RANK * self.ranks
        return Shape(self.num_experts, num_slots, num_gpus=self.ranks)

    def maps(self) -> tuple[IntArray, IntArray]:
        """Plans for two loads that have nothing to do with one another, [1, P] each."""
        random = np.random.default_rng(0)
        first, second = (
            make_plan(random.lognormal(size=(1, self.num_experts)), self.shape, policy="default").phy2log
            for _ in range(2)
        )
        return first, second


def check_move_request(request: MoveRequest) -> MoveRequest:
    """The request, when it can be carried out.

    Raises:
        ConfigError: when it makes no sense.
    """
    if request.ranks < 2:
        raise ConfigError(f"{request.ranks} ranks: nothing moves between fewer than two")
    if not request.sizes or min(request.sizes) < 8 or any(size % 8 for size in request.sizes):
        raise ConfigError(f"experts of {request.sizes} bytes: give multiples of 8")
    if request.num_experts < 1 or request.num_experts % request.ranks:
        raise ConfigError(f"{request.num_experts} experts do not divide among {request.ranks} ranks")
    return request


def run_move_bench(request: MoveRequest, timeout: float) -> list[dict[str, Any]]:
    """Measure, in processes of its own: a row per size of an expert.

    Raises:
        ConfigError: when the request makes no sense.
        CommError: when a process failed or the deadline passed.
    """
    check_move_request(request)
    rows: list[dict[str, Any]] = run_ranks(
        request.ranks, _measure_all, request, timeout=timeout, pin=request.pin
    )
    return rows


def _measure_all(request: MoveRequest) -> list[dict[str, Any]]:
    with Communicator(timeout=_SETUP_SECONDS) as comm:
        return [_measure(comm, request, nbytes) for nbytes in request.sizes]


def _measure(comm: Communicator, request: MoveRequest, nbytes: int) -> dict[str, Any]:
    """One size. **Collective.**"""
    maps, num_ranks = request.maps(), comm.world_size
    moves = [migration(*pair, num_ranks).layers[0] for pair in (maps, maps[::-1])]
    layers = {name: _Layer(request.shape, maps, comm.rank, nbytes) for name in ("tcomm", "gloo")}
    assert dist.group.WORLD is not None
    mover = make_mover(dist.group.WORLD, [layers["tcomm"].weight], timeout=_SETUP_SECONDS)
    with contextlib.closing(mover):

        def by_mover(turn: int, weight: torch.Tensor) -> None:
            mover.prepare(0, moves[turn], [weight])
            mover.commit(0, moves[turn], [weight])

        def by_gloo(turn: int, weight: torch.Tensor) -> None:
            _move_in_one_batch(moves[turn], comm.rank, weight)

        candidates = {
            # gloo's threads sleep between calls; without the barrier its times would be worse.
            "tcomm": layers["tcomm"].candidate(by_mover),
            "gloo": layers["gloo"].candidate(by_gloo, dist.barrier),
        }
        cores = {core for rank in _gather_cores() for core in rank}
        settle = comm.barrier if len(cores) < num_ranks else None
        seconds, wrong = time_alternating(candidates, request.schedule, comm.barrier, settle)
    ours, theirs = (percentiles(slowest(seconds[name], _gather)) for name in candidates)
    num_wrong = {name: int(_gather(torch.tensor([n], device="cpu")).sum()) for name, n in wrong.items()}
    return {
        "op": "expert_moves", "ranks": num_ranks, "nbytes": nbytes, "experts": request.num_experts,
        "slots": request.shape.num_replicas, "copies": sum(map(len, moves[0].rounds)),
        "rounds": len(moves[0].rounds), "affinity": f"{len(cores)} cores for {num_ranks} ranks",
        "median_us": ours.median_us, "p10_us": ours.p10_us, "p90_us": ours.p90_us,
        "wrong": num_wrong["tcomm"],
        "baseline": "gloo", "baseline_us": theirs.median_us, "baseline_p10_us": theirs.p10_us,
        "baseline_p90_us": theirs.p90_us, "ratio": theirs.median_us / ours.median_us,
        "checked": not any(num_wrong.values()),
    }  # fmt: skip


class _Layer:
    """A layer's weight on one rank, which goes to and fro between two maps."""

    def __init__(self, shape: Shape, maps: tuple[IntArray, IntArray], rank: int, nbytes: int) -> None:
        mine = slice(rank * shape.slots_per_gpu, (rank + 1) * shape.slots_per_gpu)
        self._experts = [torch.from_numpy(phy2log[0, mine]) for phy2log in maps]
        self.weight = self._experts[0][:, None].repeat(1, nbytes // 8)
        self._turn = 0

    def candidate(
        self, move: Callable[[int, torch.Tensor], None], before: Callable[[], object] | None = None
    ) -> Candidate:
        """To be timed; `before` is called ahead of each call."""

        def run() -> None:
            move(self._turn, self.weight)
            self._turn = 1 - self._turn

        return Candidate(run, before or (lambda: None), self.count_wrong)

    def count_wrong(self) -> int:
        """Elements that are not the number of their slot's expert."""
        return int((self.weight != self._experts[self._turn][:, None]).sum())


def _move_in_one_batch(moves: LayerMoves, rank: int, weight: torch.Tensor) -> None:
    """All transfers of a layer at once into a buffer, and from there into the weight."""
    size = len(weight)
    buffer = torch.empty_like(weight)
    copies = [copy for round_ in moves.rounds for copy in round_]
    transfers = []
    for copy in copies:
        source, target = copy.source // size, copy.target // size
        if source == rank:
            transfers.append(dist.P2POp(dist.isend, weight[copy.source % size], target, tag=copy.target))
        if target == rank:
            transfers.append(dist.P2POp(dist.irecv, buffer[copy.target % size], source, tag=copy.target))
    works = dist.batch_isend_irecv(transfers) if transfers else []
    mine = [copy for copy in moves.local if copy.target // size == rank]
    for copy in mine:
        buffer[copy.target % size].copy_(weight[copy.source % size])
    for work in works:
        work.wait()
    _write(weight, buffer, [copy for copy in copies if copy.target // size == rank] + mine)
    for copy in moves.duplicates:
        if copy.target // size == rank:
            weight[copy.target % size].copy_(weight[copy.source % size])


def _write(weight: torch.Tensor, buffer: torch.Tensor, copies: list[Copy]) -> None:
    for copy in copies:
        row = copy.target % len(weight)
        weight[row].copy_(buffer[row])


def move_columns(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Rows for people."""
    return [
        [
            str(row["nbytes"]),
            str(row["copies"]),
            str(row["rounds"]),
            f"{row['median_us']:.0f}",
            f"{row['p10_us']:.0f}",
            f"{row['p90_us']:.0f}",
            str(row["wrong"]),
            f"{row['baseline_us']:.0f}",
            f"{row['ratio']:.3g}",
        ]
        for row in rows
    ]


MOVE_HEADER = (
    "bytes of an expert", "copies", "rounds", "time (us)", "p10", "p90", "#wrong", "gloo (us)", "ratio",
)  # fmt: skip
"""Titles of `move_columns`."""
