"""Which range of whose input goes where: gather, scatter and all-to-all as one table.

Every collective that moves data without losing any is a matrix: rank `s` gives `counts[s][d]` elements to
rank `d`. What differs is whether a row is one range that all get (gather, broadcast) or one range after
another (scatter, all-to-all), and whether a column is put together or reduced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

__all__ = ["Parts", "broadcast_parts", "exchange_parts", "gather_parts", "scatter_parts"]

Range = tuple[int, int]
"""First element and number of elements."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What one rank gives to each rank and takes from each, as ranges of its flat tensors, in elements."""

    rank: int
    """Whose table this is."""
    sends: tuple[Range, ...]
    """Range of the input for each rank."""
    receives: tuple[Range, ...]
    """Range of the output from each rank."""
    longest: int
    """The longest part between any two ranks: the same on every rank, so that all cut alike."""
    shared: bool
    """Whether a rank gives the same range to all that get any."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.sends)

    @property
    def given(self) -> Range:
        """The range that a rank gives to all, when it is `shared`; (0, 0) when it gives nothing."""
        return max(self.sends, key=lambda part: part[1])

    def piece(self, start: int, length: int) -> Parts:
        """The part of every part from `start` on, `length` elements at most."""

        def clip(part: Range, reach: int) -> Range:
            left = max(0, part[1] - start)
            return part[0] + min(start, reach), min(left, length)

        # What all get begins in one place, also for those who get none of it.
        given = self.given[1]
        return dataclasses.replace(
            self,
            sends=tuple(clip(part, given if self.shared else part[1]) for part in self.sends),
            receives=tuple(clip(part, part[1]) for part in self.receives),
            longest=max(0, min(self.longest - start, length)),
        )

    def scaled(self, factor: int) -> Parts:
        """The same ranges counted in units of which `factor` make an element."""

        def scale(ranges: tuple[Range, ...]) -> tuple[Range, ...]:
            return tuple((first * factor, numel * factor) for first, numel in ranges)

        return dataclasses.replace(
            self,
            sends=scale(self.sends),
            receives=scale(self.receives),
            longest=self.longest * factor,
        )


def exchange_parts(counts: Sequence[Sequence[int]], rank: int) -> Parts:
    """All-to-all: rank `s` gives `counts[s][d]` elements to `d`; both sides lie in rank order."""
    return Parts(
        rank,
        sends=_one_after_another(counts[rank]),
        receives=_one_after_another([row[rank] for row in counts]),
        longest=max(max(row) for row in counts),
        shared=False,
    )


def gather_parts(sizes: Sequence[int], rank: int, root: int = -1) -> Parts:
    """Rank `s` gives all its `sizes[s]` elements to `root`, or to every rank where that is -1.

    Example: sizes (2, 1), no root -> rank 1 sends (0, 1) to both and receives (0, 2) and (2, 1).
    """
    gets = [root in (-1, d) for d in range(len(sizes))]
    nothing = [0] * len(sizes)
    return Parts(
        rank,
        sends=tuple((0, sizes[rank] if get else 0) for get in gets),
        receives=_one_after_another(sizes if gets[rank] else nothing),
        longest=max(sizes),
        shared=True,
    )


def broadcast_parts(numel: int, world_size: int, rank: int, root: int) -> Parts:
    """The root gives its `numel` elements to every rank."""
    return gather_parts([numel if r == root else 0 for r in range(world_size)], rank)


def scatter_parts(sizes: Sequence[int], rank: int, root: int = -1) -> Parts:
    """`root`, or every rank where that is -1, gives `sizes[d]` elements to rank `d`.

    Without a root a rank gets as many parts as there are ranks, each of the same size: to be reduced.
    """
    gives = [root in (-1, s) for s in range(len(sizes))]
    mine = sizes[rank]
    return Parts(
        rank,
        sends=_one_after_another(sizes if gives[rank] else [0] * len(sizes)),
        receives=tuple((0, mine if give else 0) for give in gives),
        longest=max(sizes),
        shared=False,
    )


def _one_after_another(sizes: Sequence[int]) -> tuple[Range, ...]:
    first, ranges = 0, []
    for numel in sizes:
        ranges.append((first, numel))
        first += numel
    return tuple(ranges)
