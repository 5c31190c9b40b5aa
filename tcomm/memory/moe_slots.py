"""How a token's row looks on the wire, and where the copies of one (token, expert) each lie in a half."""

from __future__ import annotations

import dataclasses

import torch

from tcomm.memory.layout import ALIGNMENT

__all__ = ["AMAX_FLOOR", "FP8_MAX", "GROUP", "LENT_SHIFT", "RowFormat", "SlotLayout"]

GROUP = 128
"""Channels that share a scale."""
FP8_MAX = 448.0
"""The largest e4m3 number."""
AMAX_FLOOR = 1e-4
"""A group of smaller numbers is scaled as if it had one of this size."""
LENT_SHIFT = 31
"""In a word of combine: of the number of a result, above the row where a source's begin."""
_EXPONENTS_PER_WORD = 4


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """What one copy of a token carries. The same on every rank of a call."""

    hidden: int
    """Channels."""
    dtype: torch.dtype
    """Of the rows that are given, and of those that come back."""
    use_fp8: bool = False
    """Whether the row travels as e4m3, with a scale for each group of channels."""
    round_scale: bool = False
    """Whether scales are powers of two."""
    use_ue8m0: bool = False
    """Whether they travel as exponents, four to an int32."""

    @property
    def wire_dtype(self) -> torch.dtype:
        """Element type of the row on the wire."""
        return torch.float8_e4m3fn if self.use_fp8 else self.dtype

    @property
    def row_nbytes(self) -> int:
        """Of the row on the wire, without its scales."""
        return self.hidden * self.wire_dtype.itemsize

    @property
    def num_scale_words(self) -> int:
        """32-bit words of scales that go with a row; the last one may be padded with zeros."""
        if not self.use_fp8:
            return 0
        groups = self.hidden // GROUP
        return -(-groups // _EXPONENTS_PER_WORD) if self.use_ue8m0 else groups

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of those words."""
        return torch.int32 if self.use_ue8m0 else torch.float32

    @property
    def wire_nbytes(self) -> int:
        """Bytes of a copy: row, scales, and the index of its token."""
        return self.row_nbytes + 4 * self.num_scale_words + 4

    def __str__(self) -> str:
        flags = ("use_fp8", "round_scale", "use_ue8m0")
        return " ".join(flag for flag in flags if getattr(self, flag))


@dataclasses.dataclass(frozen=True)
class SlotLayout:
    """The regions of a half, on every rank alike. Each comes from the capacity alone.

    ``[ words [R, El] | rows [R, slots] | scales [R, slots] | token indices [R, slots] ]``

    Example: R=2, El=2, M=3, max_topk=8, hidden 8 in bfloat16: a token has at most 2 copies for one rank, so a
    source has 6 slots; words at 0 (32 bytes, 128 with padding), rows at 128 (192 bytes, 256 with padding).
    """

    world_size: int
    """R: ranks."""
    num_local_experts: int
    """El: experts of each."""
    max_tokens: int
    """M: tokens that a rank gives in one call, at most."""
    max_topk: int
    """Experts of a token, at most."""
    hidden: int
    """Channels of a row."""
    itemsize: int
    """Bytes of a channel where it is not quantised."""

    @property
    def slots(self) -> int:
        """Copies that one rank can give to another in one call."""
        return self.max_tokens * min(self.max_topk, self.num_local_experts)

    @property
    def capacity(self) -> int:
        """Rows of a local expert in a packed result: each token of every rank may be there once."""
        return self.world_size * self.max_tokens

    @property
    def words_nbytes(self) -> int:
        """Of one word (epoch << 32 | number) for each source and local expert."""
        return _padded(8 * self.world_size * self.num_local_experts)

    @property
    def rows_offset(self) -> int:
        """Where rows begin: those of source s at slot s * slots."""
        return self.words_nbytes

    @property
    def scales_offset(self) -> int:
        """Where scales begin, in the same order."""
        return self.rows_offset + _padded(self.world_size * self.slots * self.hidden * self.itemsize)

    @property
    def indices_offset(self) -> int:
        """Where the token indices begin, in the same order."""
        return self.scales_offset + _padded(self.world_size * self.slots * (self.hidden // GROUP) * 4)

    @property
    def half_nbytes(self) -> int:
        """Of one parity."""
        return self.indices_offset + _padded(self.world_size * self.slots * 4)

    @property
    def combine_nbytes(self) -> int:
        """Of the rows that experts give back from where they lie, for one result."""
        return _padded(self.num_local_experts * self.capacity * self.hidden * self.itemsize)


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
