"""Where things lie in staging memory, and how a long message is cut. Pure functions of agreed numbers."""

from __future__ import annotations

import dataclasses

from tcomm.errors import ConfigError
from tcomm.parts import Parts

__all__ = ["ALIGNMENT", "StagingLayout", "cut", "exchange_pieces", "part_offset", "slice_numel"]

ALIGNMENT = 128
"""Bytes. Every region, slot and slice begins at a multiple of it: vector accesses and whole cache lines."""

_MINIMUM_BYTES = 64 * 1024
_MOST_LANE_BYTES = 1 << 20


def _round_down(value: int, multiple: int) -> int:
    return value // multiple * multiple


@dataclasses.dataclass(frozen=True)
class StagingLayout:
    """The regions of a rank's staging buffer.

    ``[ lanes, even epochs | lanes, odd epochs | half of even epochs | half of odd epochs ]``

    Lanes carry flag and data in one store and therefore live where no other protocol ever writes. Every
    offset comes from the capacity, never from the size of a message: a peer may still be reading the other
    half while a message of another size is written.
    """

    nbytes: int
    """Staging bytes of one rank."""
    world_size: int
    """Ranks that share it."""

    def __post_init__(self) -> None:
        if self.nbytes < _MINIMUM_BYTES:
            raise ConfigError(
                f"staging of {self.nbytes} bytes a rank is too small; give at least {_MINIMUM_BYTES}"
            )

    @property
    def lane_slot_bytes(self) -> int:
        """Of one source's lanes of one parity: a sixteenth of the buffer, shared by the sources, or 1 MiB."""
        return _round_down(min(self.nbytes // 16 // self.world_size, _MOST_LANE_BYTES), ALIGNMENT)

    @property
    def lane_half_bytes(self) -> int:
        """All sources' lanes of one parity."""
        return self.lane_slot_bytes * self.world_size

    @property
    def half_offset(self) -> int:
        """Where the half of even epochs begins."""
        return 2 * self.lane_half_bytes

    @property
    def half_bytes(self) -> int:
        """Of one parity: the largest message of an algorithm that stages its own input only."""
        return _round_down((self.nbytes - self.half_offset) // 2, ALIGNMENT)

    @property
    def slot_bytes(self) -> int:
        """Of one source in a half: the largest message of an algorithm that pushes to every peer."""
        return _round_down(self.half_bytes // self.world_size, ALIGNMENT)

    def half(self, parity: int) -> int:
        """Offset of the half for epochs of `parity`."""
        return self.half_offset + parity * self.half_bytes

    @staticmethod
    def for_message(nbytes: int, world_size: int) -> int:
        """Staging bytes a rank so that a message of `nbytes` goes in one piece, except by lanes."""
        slots = (nbytes + ALIGNMENT) * world_size
        return _round_up(max(_MINIMUM_BYTES, 2 * slots * 8 // 7 + 16 * ALIGNMENT * world_size), 4096)

    @staticmethod
    def for_half(nbytes: int, world_size: int) -> int:
        """Staging bytes a rank so that a half has `nbytes`."""
        halves = 2 * _round_up(nbytes, ALIGNMENT) + 2 * ALIGNMENT
        lanes = min(halves // 7 + 1, 2 * world_size * _MOST_LANE_BYTES)
        return _round_up(max(_MINIMUM_BYTES, halves + lanes), 4096)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def cut(numel: int, itemsize: int, capacity: int) -> list[tuple[int, int]]:
    """Cut a message into pieces that fit, each its own epoch.

    Args:
        numel: elements of the message; none make one empty piece, because every rank takes part.
        itemsize: bytes an element.
        capacity: bytes that the algorithm can take at once.

    Returns:
        (first element, number of elements) of each piece, in order. All begin at a multiple of
        `ALIGNMENT` bytes.
    """
    step = _round_down(capacity, ALIGNMENT) // itemsize
    if step <= 0:
        raise ConfigError(f"a capacity of {capacity} bytes holds no aligned piece; enlarge the staging")
    return [(start, min(step, numel - start)) for start in range(0, max(numel, 1), step)]


def slice_numel(numel: int, itemsize: int, world_size: int) -> int:
    """Elements that each rank reduces in a two-shot algorithm; the last ranks may have fewer, or none."""
    unit = ALIGNMENT // itemsize
    return _round_up(-(-numel // world_size), unit)


def part_offset(algorithm: str, layout: StagingLayout, shared: bool, source: int, destination: int) -> int:
    """Where in a half the part lies that `source` gives to `destination`, in bytes.

    Pulled parts lie at their source, in the slot of their destination, or at the beginning when all get the
    same. Pushed parts lie at their destination, in the slot of their source.
    """
    if algorithm == "push":
        return source * layout.slot_bytes
    return 0 if shared else destination * layout.slot_bytes


def exchange_pieces(
    algorithm: str, layout: StagingLayout, parts: Parts, piece_nbytes: int = 0
) -> list[Parts]:
    """Cut an exchange into calls whose parts fit.

    Args:
        algorithm: `push` or `pull`.
        layout: of the staging.
        parts: in bytes.
        piece_nbytes: of a part, at most; 0: as many as fit.
    """
    capacity = layout.half_bytes if algorithm == "pull" and parts.shared else layout.slot_bytes
    pieces = cut(parts.longest, 1, min(capacity, piece_nbytes or capacity))
    return [parts.piece(start, length) for start, length in pieces]
