"""How much a buffer's calls may use at once, and what memory that takes."""

from __future__ import annotations

import dataclasses

from tcomm.errors import UsageError

__all__ = ["ALIGNMENT", "Config", "check_nbytes", "check_num_sms", "config_for"]

ALIGNMENT = 128
"""Sizes of buffers are multiples of so many bytes."""
_MOST_WORDS = 1 << 31
_WORD_NBYTES = 16
_TOPK_NBYTES = 32 * (8 + 4)


@dataclasses.dataclass(frozen=True)
class Config:
    """Processors and pieces of a high-throughput exchange. Made by `Buffer.get_dispatch_config` and its like.

    Raises:
        UsageError: when a number is negative, or `num_sms` odd.
    """

    num_sms: int = 20
    """Processors of a GPU, an even number."""
    num_max_nvl_chunked_send_tokens: int = 6
    """Tokens of a piece that is sent; of no influence."""
    num_max_nvl_chunked_recv_tokens: int = 256
    """Tokens that there is room for from each rank."""
    num_max_rdma_chunked_send_tokens: int = 6
    """Of no influence."""
    num_max_rdma_chunked_recv_tokens: int = 256
    """Of no influence."""

    def __post_init__(self) -> None:
        check_num_sms(self.num_sms)
        for name, value in dataclasses.asdict(self).items():
            if value < 0:
                raise UsageError(f"{name}={value} of a Config is negative")

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes of a buffer in which pieces of that many tokens from each rank and channel have room.

        Args:
            hidden_bytes: of a token.
            num_ranks: of the group.
        """
        rows = num_ranks * (self.num_sms // 2) * self.num_max_nvl_chunked_recv_tokens
        nbytes = rows * (hidden_bytes + _TOPK_NBYTES)
        return -(-nbytes // ALIGNMENT) * ALIGNMENT

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """0: ranks share memory, or do not exchange tokens by buffers.

        Args:
            hidden_bytes: of a token.
            num_ranks: of the group.
        """
        del hidden_bytes, num_ranks
        return 0


def config_for(num_ranks: int, num_sms: int) -> Config:
    """What suits a group; any number of ranks will do.

    Raises:
        UsageError: when there is no rank.
    """
    if num_ranks < 1:
        raise UsageError(f"Unsupported number of EP ranks: {num_ranks}")
    return Config(num_sms)


def check_num_sms(num_sms: int) -> None:
    """Check a number of processors.

    Raises:
        UsageError: when it is odd or negative.
    """
    if num_sms < 0 or num_sms % 2:
        raise UsageError(f"The SM count must be even: {num_sms}")


def check_nbytes(name: str, nbytes: int) -> None:
    """Check the size of a buffer.

    Raises:
        UsageError: when it is negative, no multiple of 128, or 32 GiB and more.
    """
    if nbytes < 0 or nbytes % ALIGNMENT or nbytes // _WORD_NBYTES >= _MOST_WORDS:
        raise UsageError(
            f"{name}={nbytes}: give a multiple of {ALIGNMENT} bytes, below {_MOST_WORDS * _WORD_NBYTES}"
        )
