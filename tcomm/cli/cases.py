"""What a benchmark measures: every collective's input, result and size, counted as nccl-tests counts them.

A message is a range of elements 0..numel. Each verb says which of them a rank gives, and of which it gets
whose, or all ranks' reduced. From that follow the input of a call and what its result must be.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch

from tcomm.errors import ConfigError
from tcomm.tuning.measure import Candidate

__all__ = ["REDUCING", "ROOT", "ROOTED", "VERBS", "Case", "check_size", "parts_of"]

ROOT = 0
"""Where the root of the rooted verbs is."""
VERBS = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather_single",
    "reduce_scatter": "reduce_scatter_single",
    "all_to_all": "all_to_all_single",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "all_gatherv": "all_gatherv",
    "reduce_scatterv": "reduce_scatterv",
    "all_to_allv": "all_to_all_single",
    "sendrecv": "send",
    "barrier": "barrier",
}
"""The communicator's method for each name of nccl-tests' kind."""
REDUCING = frozenset({"all_reduce", "reduce", "reduce_scatter", "reduce_scatterv"})
"""Those that a reduce operation matters to."""
ROOTED = frozenset({"broadcast", "reduce", "gather", "scatter"})
"""Those that have a root."""
_EVEN = frozenset({"all_gather", "reduce_scatter", "all_to_all", "gather", "scatter"})

_CHECKED_WHOLE_BYTES = 64 * 1024
_WHOLE_CHECK_PERIOD = 8
_SAMPLE = 1024
_TURNS = 5


def check_size(op: str, nbytes: int, dtype: torch.dtype, world_size: int) -> None:
    """Refuse a message that cannot be cut as the verb has to cut it.

    Raises:
        ConfigError: says which sizes can.
    """
    unit = dtype.itemsize * (world_size if op in _EVEN else 1)
    if nbytes % unit:
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"{op} of {nbytes} bytes: not a multiple of {unit} bytes, "
            + (f"equal parts of {name} for {world_size} ranks" if op in _EVEN else f"the size of a {name}")
        )
    if op == "sendrecv" and world_size < 2:
        raise ConfigError("sendrecv needs two ranks: nobody sends to itself")


def parts_of(op: str, numel: int, world_size: int) -> list[int]:
    """Elements of each rank's part: equal, or for the v forms r + 1 shares of rank r."""
    weights = [rank + 1 if op.endswith("v") else 1 for rank in range(world_size)]
    ends = [numel * sum(weights[:rank]) // sum(weights) for rank in range(world_size + 1)]
    return [high - low for low, high in itertools.pairwise(ends)]


@dataclasses.dataclass(frozen=True)
class _Segment:
    """A stretch of a result."""

    source: int | None
    """Whose elements; None: all ranks', reduced."""
    elements: range
    """Which of the message."""


def _layout(op: str, rank: int, numel: int, parts: Sequence[int]) -> tuple[range, list[_Segment]]:
    """The elements that a rank gives, and the segments of what it gets."""
    world_size = len(parts)
    ranges = [range(sum(parts[:r]), sum(parts[: r + 1])) for r in range(world_size)]
    whole, mine = range(numel), ranges[rank]
    gathered = [_Segment(source, part) for source, part in enumerate(ranges)]
    exchanged = [_Segment(source, mine) for source in range(world_size)]
    is_root = rank == ROOT
    table: dict[str, tuple[range, list[_Segment]]] = {
        "all_reduce": (whole, [_Segment(None, whole)]),
        "reduce": (whole, [_Segment(None, whole)] if is_root else []),
        "reduce_scatter": (whole, [_Segment(None, mine)]),
        "broadcast": (whole, [_Segment(ROOT, whole)]),
        "all_gather": (mine, gathered),
        "gather": (mine, gathered if is_root else []),
        "scatter": (whole, [_Segment(ROOT, mine)]),
        "all_to_all": (whole, exchanged),
        "sendrecv": (whole, [_Segment((rank - 1) % world_size, whole)]),
        "barrier": (range(0), []),
    }
    return table[op if op in table else op.removesuffix("v")]


class Case:
    """One verb at one size on one rank: fresh input before each call, the result compared after it.

    Args:
        op: one of `VERBS`.
        rank: of this process.
        world_size: number of ranks.
        numel: elements of the message.
        dtype: element type.
        redop: reduce operation.
        reuses: whether the result goes to memory that was used before, or is new each time.
    """

    def __init__(
        self, op: str, rank: int, world_size: int, numel: int, dtype: torch.dtype, redop: str, reuses: bool
    ) -> None:
        self.op, self.rank, self.world_size = op, rank, world_size
        self.dtype, self.redop, self.reuses = dtype, redop, reuses
        self.numel = numel
        self.parts = parts_of(op, numel, world_size)
        give, take = _layout(op, rank, numel, self.parts)
        self.x = torch.zeros(len(give), dtype=dtype, device="cpu")
        self.out = torch.zeros(sum(len(segment.elements) for segment in take), dtype=dtype, device="cpu")
        self.has_result = bool(take)
        self._result: torch.Tensor | None = None
        self._calls = 0
        self._is_reduced = any(segment.source is None for segment in take)
        # Small integers: every sum is exact, in any order and any of the types.
        self._given = _pattern(give)
        self._expected = _joined([_pattern(segment.elements) for segment in take])
        self._sources = _joined(
            [torch.full((len(s.elements),), s.source or 0, dtype=torch.int16, device="cpu") for s in take]
        )
        self._is_long = numel * dtype.itemsize > _CHECKED_WHOLE_BYTES
        self._places = _some(len(self._expected))

    def candidate(
        self, call: Callable[[], torch.Tensor | None], before: Callable[[], object] | None = None
    ) -> Candidate:
        """Time `call`, which returns this rank's result; `before` comes after the input is ready."""

        def run() -> None:
            self._result = call()

        def prepare() -> None:
            self._prepare()
            if before is not None:
                before()

        return Candidate(run, prepare, self._count_wrong)

    @property
    def _is_uniform(self) -> bool:
        """Whether a rank gives one number at this call, and not a pattern.

        Reading a pattern before each call, and an expectation after it, would leave the caches of a long
        message to the benchmark; a program has just written what it sends.
        """
        return self._is_long and self._calls % _WHOLE_CHECK_PERIOD != 0

    def _prepare(self) -> None:
        self._calls += 1
        turn = self._calls % _TURNS
        if self._is_uniform:
            self.x.fill_(turn + self.rank)
        else:
            self.x.copy_(self._given + (turn + self.rank))

    def _count_wrong(self) -> int:
        if not self.has_result:
            return 0
        if self._result is None or self._result.numel() != len(self._expected):
            return max(1, len(self._expected))
        result, sources, elements = self._result.view(-1), self._sources, self._expected
        if self._is_uniform:
            result, sources = result[self._places], self._sources[self._places]
            elements = torch.zeros_like(sources)
        given = sources + elements + self._calls % _TURNS
        expected = self._reduced(given) if self._is_reduced else given
        return int((result != expected.to(self.dtype)).sum())

    def _reduced(self, base: torch.Tensor) -> torch.Tensor:
        ranks = range(self.world_size)
        if self.redop in {"max", "min"}:
            return base + (max(ranks) if self.redop == "max" else 0)
        total = base * len(ranks) + sum(ranks)
        return total / len(ranks) if self.redop == "avg" else total


def _pattern(elements: range) -> torch.Tensor:
    return (torch.arange(elements.start, elements.stop, device="cpu") % 7).to(torch.int16)


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(tensors) if tensors else torch.empty(0, dtype=torch.int16, device="cpu")


def _some(numel: int) -> torch.Tensor:
    """Both ends and some thousand places in between."""
    places = torch.arange(numel, device="cpu")
    return torch.cat([places[:_SAMPLE], places[:: max(1, numel // _SAMPLE)], places[-_SAMPLE:]]).clone()
