"""Rings of slots with credits between every two ranks: where they lie, and how rows are cut for them.

A rank's buffer has a ring for each source and lane: the source fills slots in order, the owner empties them
in order. Counts are 64 bits wide and only grow, so nothing is ever reset.
"""

from __future__ import annotations

import dataclasses

from tcomm.errors import ConfigError

__all__ = ["HEAD", "RECEIVED", "RING_SLOTS", "SENT", "TAIL", "Pieces", "RingLayout"]

RING_SLOTS = 4
"""Slots of a ring, and so the credits of its source."""
HEAD, TAIL, SENT, RECEIVED = range(4)
"""Counts of slots. HEAD: filled by a source, written by it. TAIL: of this rank's that a destination has
emptied, written by it. SENT, RECEIVED: of all calls so far, the owner's own."""

_ALIGNMENT = 128
_LINE_WORDS = 8


@dataclasses.dataclass(frozen=True)
class RingLayout:
    """The buffer of one rank: ``[ tokens announced | counts of slots | slots ]``. The same on all ranks."""

    world_size: int
    num_lanes: int
    """Rings of an ordered pair of ranks, which work side by side."""
    slot_nbytes: int
    """Payload of a slot, a multiple of 128."""

    @staticmethod
    def within(nbytes: int, world_size: int, num_lanes: int) -> RingLayout:
        """The rings that fit in `nbytes` a rank, with all their counts.

        Raises:
            ConfigError: when a slot would have less than 128 bytes.
        """
        smallest = RingLayout(world_size, num_lanes, _ALIGNMENT)
        rings = world_size * num_lanes * RING_SLOTS
        slot = (nbytes - smallest.slots_at) // rings // _ALIGNMENT * _ALIGNMENT
        if slot < _ALIGNMENT:
            raise ConfigError(
                f"num_nbytes={nbytes} is too little for rings from {world_size} ranks; "
                f"give at least {smallest.nbytes}"
            )
        return RingLayout(world_size, num_lanes, slot)

    @property
    def words_at(self) -> int:
        """First count, in words: two sets of announced tokens lie ahead of it, one for each parity."""
        return -(-2 * self.world_size * 8 // _ALIGNMENT) * _ALIGNMENT // 8

    def word(self, kind: int, peer: int, lane: int) -> int:
        """Index of a count among the 64-bit words of the buffer; each has a cache line of its own."""
        return self.words_at + ((kind * self.world_size + peer) * self.num_lanes + lane) * _LINE_WORDS

    @property
    def slots_at(self) -> int:
        """Where the slots begin, in bytes."""
        return -(-self.word(RECEIVED + 1, 0, 0) * 8 // _ALIGNMENT) * _ALIGNMENT

    def slot(self, source: int, lane: int, turn: int) -> int:
        """Where the slot of that turn begins in the ring of a source, in bytes."""
        ring = source * self.num_lanes + lane
        return self.slots_at + (ring * RING_SLOTS + turn % RING_SLOTS) * self.slot_nbytes

    @property
    def nbytes(self) -> int:
        """Of one rank's buffer. It does not depend on any number of tokens."""
        return self.slot(self.world_size, 0, 0)


@dataclasses.dataclass(frozen=True)
class Pieces:
    """How rows are cut into slots: whole rows while they fit, else each row into several.

    Example: slots of 128 bytes. Rows of 48: 2 in a slot, 5 rows make 3 pieces. Rows of 300: 3 columns of
    128, 128 and 44 bytes, so 5 rows make 15 pieces.
    """

    row_nbytes: int
    slot_nbytes: int

    @property
    def width(self) -> int:
        """Bytes of a row that go in one piece."""
        return min(self.row_nbytes, self.slot_nbytes)

    @property
    def num_columns(self) -> int:
        """Pieces that a row is cut into."""
        return -(-self.row_nbytes // self.width)

    @property
    def num_rows(self) -> int:
        """Rows that go in one piece."""
        return self.slot_nbytes // self.width

    def count(self, num_rows: int) -> int:
        """Pieces of so many rows."""
        return -(-num_rows // self.num_rows) * self.num_columns
