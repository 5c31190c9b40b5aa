"""How many tokens every rank brings to a forward pass."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Protocol

import torch

from tcomm.errors import UsageError

__all__ = ["DPMetadata", "current_metadata", "use_metadata"]


class _Placed(Protocol):
    """What a `ParallelConfig` says of data parallelism."""

    data_parallel_size: int
    data_parallel_rank: int
    is_moe_model: bool | None


@dataclasses.dataclass
class DPMetadata:
    """Tokens by data parallel rank, the same on every rank.

    Attributes:
        max_tokens_across_dp_cpu: scalar: the most that a rank has.
        num_tokens_across_dp_cpu: [DP] integers in host memory.
        local_sizes: inside of `sp_local_sizes` or `chunked_sizes`: tokens of each rank that exchanges.
    """

    max_tokens_across_dp_cpu: torch.Tensor
    num_tokens_across_dp_cpu: torch.Tensor
    local_sizes: list[int] | None = None

    @staticmethod
    def make(parallel_config: _Placed, num_tokens: int, num_tokens_across_dp_cpu: torch.Tensor) -> DPMetadata:
        """Metadata of a pass.

        Args:
            parallel_config: with its DP size and rank.
            num_tokens: of this rank.
            num_tokens_across_dp_cpu: [DP] integers in host memory.

        Raises:
            UsageError: without data parallelism or experts, or when the counts are others than these.
        """
        size, rank = parallel_config.data_parallel_size, parallel_config.data_parallel_rank
        if size <= 1 or parallel_config.is_moe_model is False:
            raise UsageError(
                f"tokens are counted across DP ranks in a model with experts and data_parallel_size > 1; "
                f"this one has data_parallel_size={size}, is_moe_model={parallel_config.is_moe_model}"
            )
        counts = num_tokens_across_dp_cpu
        if counts.dim() != 1 or counts.numel() != size or counts.device.type != "cpu":
            raise UsageError(f"counts {list(counts.shape)} on {counts.device}; give one per DP rank, on cpu")
        if int(counts[rank]) != num_tokens:
            raise UsageError(f"{int(counts[rank])} {num_tokens}: the count of DP rank {rank} is another")
        return DPMetadata(counts.max(), counts)

    def _sp_sizes(self, sequence_parallel_size: int) -> list[int]:
        """Tokens of each rank, where a DP rank's are cut over so many; those may end with padding."""
        if sequence_parallel_size < 1:
            raise UsageError(f"sequence_parallel_size={sequence_parallel_size}; give 1 or more")
        counts = self.num_tokens_across_dp_cpu.tolist()
        return [
            -(-count // sequence_parallel_size) for count in counts for _ in range(sequence_parallel_size)
        ]

    @contextlib.contextmanager
    def sp_local_sizes(self, sequence_parallel_size: int) -> Iterator[list[int]]:
        """Let each rank have its share of its DP rank's tokens inside.

        Args:
            sequence_parallel_size: ranks that share the tokens of a DP rank.

        Yields:
            `ceil(count / sequence_parallel_size)` so many times for each DP rank.

        Raises:
            UsageError: when that size is less than 1.
        """
        with self._sizes(self._sp_sizes(sequence_parallel_size)) as sizes:
            yield sizes

    @contextlib.contextmanager
    def chunked_sizes(
        self, sequence_parallel_size: int, max_chunk_size_per_rank: int, chunk_idx: int
    ) -> Iterator[list[int]]:
        """Let each rank have one chunk of its share inside. All chunks have a token at least.

        So ranks with few tokens go on with a dummy while others have more.

        Args:
            sequence_parallel_size: as for `sp_local_sizes`.
            max_chunk_size_per_rank: tokens of a whole chunk.
            chunk_idx: which, from 0.

        Yields:
            The sizes.

        Raises:
            UsageError: when a size is less than 1 or the index negative.
        """
        if max_chunk_size_per_rank < 1 or chunk_idx < 0:
            raise UsageError(f"chunk {chunk_idx} of at most {max_chunk_size_per_rank} tokens is none")
        done = max_chunk_size_per_rank * chunk_idx
        shares = self._sp_sizes(sequence_parallel_size)
        sizes = [max(1, min(max_chunk_size_per_rank, share - done)) for share in shares]
        with self._sizes(sizes):
            yield sizes

    @contextlib.contextmanager
    def _sizes(self, sizes: list[int]) -> Iterator[list[int]]:
        before, self.local_sizes = self.local_sizes, sizes
        try:
            yield sizes
        finally:
            self.local_sizes = before

    def get_chunk_sizes_across_dp_rank(self) -> list[int]:
        """Tokens of each rank that exchanges now.

        Raises:
            UsageError: outside of `sp_local_sizes` and `chunked_sizes`.
        """
        if self.local_sizes is None:
            raise UsageError("local_sizes is not set; call inside of sp_local_sizes() or chunked_sizes()")
        return self.local_sizes

    def cu_tokens_across_sp(self, sp_size: int) -> torch.Tensor:
        """int32 [DP * sp_size]: tokens up to and with each rank, each with its share.

        Args:
            sp_size: as for `sp_local_sizes`.

        Raises:
            UsageError: when that size is less than 1.
        """
        shares = torch.tensor(self._sp_sizes(sp_size), dtype=torch.int32, device="cpu")
        return shares.cumsum(0, dtype=torch.int32)


_current: contextvars.ContextVar[DPMetadata | None] = contextvars.ContextVar(
    "tcomm_dp_metadata", default=None
)


def current_metadata() -> DPMetadata | None:
    """The metadata of the innermost `use_metadata` of this thread or task; None outside."""
    return _current.get()


@contextlib.contextmanager
def use_metadata(metadata: DPMetadata | None) -> Iterator[DPMetadata | None]:
    """Put metadata in force in this thread or task: where managers look when they get no `sizes`."""
    token = _current.set(metadata)
    try:
        yield metadata
    finally:
        _current.reset(token)
