"""Where rows of tokens lie in a half that they pass through. Pure functions of agreed numbers."""

from __future__ import annotations

import dataclasses

from tcomm.errors import ConfigError
from tcomm.memory.layout import ALIGNMENT

__all__ = ["DispatchRegions", "ReturnRegions"]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _fit(half_nbytes: int, fixed: int, token_nbytes: int) -> int:
    """Tokens that fit a half."""
    num_tokens = (half_nbytes - fixed) // token_nbytes
    if num_tokens < 1:
        raise ConfigError(
            f"a half of {half_nbytes} bytes holds no token, which takes {token_nbytes} bytes and {fixed} bytes "
            "for all of them; enlarge the buffer"
        )
    return num_tokens


@dataclasses.dataclass(frozen=True)
class DispatchRegions:
    """What a rank gives in one piece of a dispatch, in its own half.

    ``[ head | list for each rank | facts of each token | row of each token ]``

    The head has 2R + 1 words: rows for each rank in all pieces, rows for each rank in this one, and tokens
    in all pieces; each is a count below the epoch. A list has `token * width + place` (int32) of each token
    that goes to a rank, in order. Facts are int32 words: ids, weights, scales.

    Example: R=2, facts of 4 words, rows of 16 bytes, a half of 1024 bytes: head at 0, 16 tokens; lists of
    64 bytes at 128, facts at 256, rows at 512.
    """

    half_nbytes: int
    """Of the half."""
    world_size: int
    """Ranks."""
    row_nbytes: int
    """Of a token's row."""
    num_facts: int
    """Words of a token's facts."""

    @property
    def num_head_words(self) -> int:
        """Of 64 bits."""
        return 2 * self.world_size + 1

    @property
    def num_tokens(self) -> int:
        """Tokens of a rank in one piece, at most."""
        fixed = _aligned(8 * self.num_head_words) + 2 * ALIGNMENT
        per_token = 4 * self.world_size + 4 * self.num_facts + self.row_nbytes
        return _fit(self.half_nbytes, fixed, per_token)

    def list_offset(self, destination: int) -> int:
        """Where the list for a rank begins."""
        return _aligned(8 * self.num_head_words) + destination * 4 * self.num_tokens

    @property
    def facts_offset(self) -> int:
        """Where the facts begin."""
        return _aligned(self.list_offset(self.world_size))

    @property
    def rows_offset(self) -> int:
        """Where the rows begin."""
        return _aligned(self.facts_offset + 4 * self.num_facts * self.num_tokens)


@dataclasses.dataclass(frozen=True)
class ReturnRegions:
    """What ranks put into the half of a token's source in one piece of a combine.

    ``[ row of each (token, place) | weights of each (token, place) ]``
    """

    half_nbytes: int
    """Of the half."""
    width: int
    """Places of a token: most ranks that it can go to."""
    row_nbytes: int
    """Of a row."""
    num_weights: int
    """Words of weights that come with a row."""

    @property
    def num_tokens(self) -> int:
        """Tokens of a rank in one piece, at most."""
        return _fit(self.half_nbytes, ALIGNMENT, self.width * (self.row_nbytes + 4 * self.num_weights))

    @property
    def weights_offset(self) -> int:
        """Where the weights begin."""
        return _aligned(self.num_tokens * self.width * self.row_nbytes)
