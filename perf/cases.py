"""Which cases the suite measures, how often, and where."""

from __future__ import annotations

import dataclasses

from tcomm.cli.bench import BenchRequest, Measurement, check_request, measure, parse_sizes
from tcomm.cli.cases import VERBS
from tcomm.cli.workers import Ranks, why_no_mpi
from tcomm.errors import ConfigError, TcommError
from tcomm.groups.communicator import Communicator
from tcomm.tuning.measure import Schedule

IMPLS = ("tcomm", "gloo", "mpi")
TIMEOUT = 240.0
LONG_NBYTES = 4 << 20
LONG_CALLS = 5


@dataclasses.dataclass(frozen=True)
class Key:
    """One collective at one size: what its contenders are compared on."""

    op: str
    nbytes: int
    ranks: int
    out: str

    @property
    def size(self) -> str:
        for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
            if self.nbytes and self.nbytes % unit == 0:
                return f"{self.nbytes // unit}{name}"
        return f"{self.nbytes}B"

    @property
    def id(self) -> str:
        return f"{self.op}-{self.size}-{self.ranks}ranks"


def keys(sizes: str, worlds: str, out: str) -> list[Key]:
    """Every verb at every size; one world after another, since only one world runs at a time."""
    made = []
    for ranks in (int(world) for world in worlds.split(",")):
        for op in VERBS:
            if op == "barrier":
                made.append(Key(op, 0, ranks, "none"))
            else:
                made += [Key(op, nbytes, ranks, out) for nbytes in parse_sizes(sizes)]
    return made


def request_of(key: Key, blocks: int, calls: int, baselines: tuple[str, ...]) -> BenchRequest:
    """What `tcomm bench` would measure; long messages less often."""
    if key.nbytes >= LONG_NBYTES:
        calls = min(calls, LONG_CALLS)
    return check_request(
        BenchRequest(
            key.op, key.ranks, (key.nbytes,), outs=(key.out,), schedule=Schedule(blocks, calls, 3),
            pin=True, against=baselines,
        )
    )  # fmt: skip


def measure_once(request: BenchRequest) -> Measurement:
    """In every rank."""
    with Communicator(timeout=60.0) as comm:
        return measure(comm, request, request.sizes[0], request.outs[0])


class Bench:
    """Measures each case once, all contenders in one run, and keeps what it measured.

    The ranks of a world live from its first case to its last.
    """

    def __init__(self, blocks: int, calls: int) -> None:
        self.blocks, self.calls = blocks, calls
        self.no_mpi = why_no_mpi()
        self.measured: dict[Key, Measurement] = {}
        self._failed: dict[Key, TcommError] = {}
        self._ranks: Ranks | None = None

    def of(self, key: Key) -> Measurement:
        """Raises what the measurement raised, for each contender of the case."""
        if key in self._failed:
            raise self._failed[key]
        if key not in self.measured:
            try:
                self.measured[key] = self._measure(key)
            except TcommError as error:
                self._failed[key] = error
                if not isinstance(error, ConfigError):
                    self.close()
                raise
        return self.measured[key]

    def _measure(self, key: Key) -> Measurement:
        baselines = ("gloo",) if self.no_mpi else ("gloo", "mpi")
        request = request_of(key, self.blocks, self.calls, baselines)
        if self._ranks is None or self._ranks.world_size != key.ranks:
            self.close()
            self._ranks = Ranks(key.ranks, pin=True, mpi=not self.no_mpi, timeout=TIMEOUT)
        measured = Measurement(**self._ranks.run(measure_once, request, timeout=TIMEOUT))
        if any(measured.wrong.values()):
            raise TcommError(f"{key.id}: wrong elements: {measured.wrong}")
        return measured

    def close(self) -> None:
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None
