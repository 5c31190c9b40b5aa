"""Which token goes to which ranks: counted from a router's choice, and kept for the way back."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import torch

from tcomm.cpu.moe_layout import count_experts, find_holders
from tcomm.errors import ConfigError
from tcomm.groups.arguments import check_tensor
from tcomm.groups.moe.expert_ids import check_divides, check_expert_ids
from tcomm.kernels.moe_layout import find_layout

__all__ = ["Layout", "Routing", "check_topk", "check_topk_shape", "make_layout"]

MOST_CHOICES = 32
"""Experts that a token may be given to."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the tokens of one rank go."""

    num_tokens_per_rank: torch.Tensor
    """[R] int32: tokens that go to each rank; one of whose experts several live there counts once."""
    num_tokens_per_expert: torch.Tensor
    """[E] int32: tokens that go to each expert."""
    is_token_in_rank: torch.Tensor
    """[T, R] bool."""


def check_topk(topk_idx: torch.Tensor, num_experts: int, world_size: int = 1) -> None:
    """Check what a router chose. Looks at the values, so a GPU is waited for.

    Args:
        topk_idx: [T, k] int64; -1 where nothing was selected.
        num_experts: of all ranks.
        world_size: ranks that share them evenly.

    Raises:
        ConfigError: when it is no such tensor, or names an expert that there is not; says of which token.
    """
    check_topk_shape(topk_idx, num_experts, world_size)
    check_expert_ids(topk_idx, num_experts)


def check_topk_shape(topk_idx: torch.Tensor, num_experts: int, world_size: int) -> None:
    """What `check_topk` can tell without looking at the values.

    Raises:
        ConfigError: when it is no such tensor, or the experts cannot be shared evenly.
    """
    check_divides(num_experts, world_size)
    check_tensor("topk_idx", topk_idx)
    if topk_idx.dim() != 2 or topk_idx.dtype != torch.int64:
        given = f"{topk_idx.dtype} {list(topk_idx.shape)}"
        raise ConfigError(f"topk_idx is {given}; give int64 [tokens, choices]")
    if not 1 <= topk_idx.shape[1] <= MOST_CHOICES:
        raise ConfigError(
            f"topk_idx has {topk_idx.shape[1]} choices a token; 1 to {MOST_CHOICES} are possible"
        )


def make_layout(topk_idx: torch.Tensor, num_experts: int, world_size: int, engine: str = "cpu") -> Layout:
    """Count where the tokens of this rank go. Not collective, and no GPU is waited for.

    On a GPU nobody looks at the experts: one that there is not counts as none.

    Args:
        topk_idx: [T, k] int64; -1 where nothing was selected.
        num_experts: of all ranks; expert e lives on rank `e // (num_experts // world_size)`.
        world_size: number of ranks.
        engine: `cpu`, or `triton` for kernels.

    Raises:
        ConfigError: when topk_idx is no such tensor, or names an expert that there is not.
    """
    if isinstance(topk_idx, torch.Tensor) and topk_idx.device.type not in {"cpu", "cuda"}:
        raise ConfigError(f"topk_idx is on {topk_idx.device}; tokens are on 'cpu' or 'cuda'")
    looks = isinstance(topk_idx, torch.Tensor) and topk_idx.device.type == "cpu"
    (check_topk if looks else check_topk_shape)(topk_idx, num_experts, world_size)
    if engine == "triton":
        found = find_layout(topk_idx.contiguous(), num_experts, world_size)
        return Layout(found.prefix[-1], found.num_tokens_per_expert, found.slots >= 0)
    holders = find_holders(topk_idx, num_experts, world_size)
    reached = torch.zeros(len(topk_idx), world_size + 1, dtype=torch.bool, device="cpu").scatter_(
        1, holders + 1, True
    )
    in_rank = reached[:, 1:].contiguous()
    return Layout(in_rank.sum(0, dtype=torch.int32), count_experts(topk_idx, num_experts), in_rank)


class Routing:
    """What a dispatch leaves for those after it: where each row came from, and how to send it back.

    Holds no data of tokens. It unpacks like the handle of `deep_ep.Buffer`, with one channel.

    Attributes:
        slots: [T, R] integers; the place of each rank in a token's order of ranks, -1 where it does not go.
        row_slots: [N] int64; `token * width + place` at its source, of each received row; -1 of unused rows.
        num_topk: choices a token.
        num_experts: of all ranks.
        width: most ranks that a token can go to.
        counts: [s][r], rows from rank s to rank r; None where only a GPU knows them.
        num_rows: rows of received tensors, with unused ones.
        most_tokens: tokens of the rank that has most; None where only a GPU knows.
        matrix: [R, R] int32; counts as a tensor.
        number: of the dispatch among those of its exchange, from 1, the same on every rank.
    """

    def __init__(
        self,
        rank: int,
        slots: torch.Tensor,
        row_slots: torch.Tensor,
        matrix: torch.Tensor,
        counts: list[list[int]] | None,
        most_tokens: int | None,
        num_topk: int,
        num_experts: int,
        prefix: torch.Tensor | None = None,
    ) -> None:
        self.rank = rank
        self.slots = slots
        self.row_slots = row_slots
        self.matrix = matrix
        self.counts = counts
        self.most_tokens = most_tokens
        self.num_topk = num_topk
        self.num_experts = num_experts
        self.number = 1
        self._prefix = prefix
        self.width = min(num_topk, slots.shape[1])

    @property
    def num_tokens(self) -> int:
        """Tokens of this rank."""
        return len(self.slots)

    @property
    def num_rows(self) -> int:
        """Rows that this rank received, with unused ones."""
        return len(self.row_slots)

    @functools.cached_property
    def num_places(self) -> torch.Tensor:
        """[T] int64: ranks that each token goes to."""
        return self.is_token_in_rank.sum(1)

    @functools.cached_property
    def _starts(self) -> list[int]:
        """Where the rows of each source begin, and where the last ones end."""
        assert self.counts is not None
        return [0, *itertools.accumulate(row[self.rank] for row in self.counts)]

    def rows_of(self, source: int) -> slice:
        """The rows that came from a rank."""
        return slice(self._starts[source], self._starts[source + 1])

    @property
    def rank_prefix_matrix(self) -> torch.Tensor:
        """[R, R] int32: at [s, r], rows that rank r got from ranks 0 to s."""
        return self.matrix.cumsum(0, dtype=torch.int32)

    @property
    def channel_prefix_matrix(self) -> torch.Tensor:
        """[R, 1] int32: tokens of this rank for each rank, by the end of its one channel."""
        return self.matrix[self.rank, :, None].clone()

    @property
    def recv_channel_prefix_matrix(self) -> torch.Tensor:
        """[R, 1] int32: where in the rows of a source its one channel begins."""
        return torch.zeros_like(self.channel_prefix_matrix)

    @property
    def recv_src_idx(self) -> torch.Tensor:
        """[N] int32: the token at its source that each received row is; -1 of unused rows."""
        return self.row_slots.div(self.width, rounding_mode="floor").to(torch.int32)

    @property
    def is_token_in_rank(self) -> torch.Tensor:
        """[T, R] bool."""
        return self.slots >= 0

    @property
    def send_head(self) -> torch.Tensor:
        """[T, R] int32: which of the rows that this rank sends to a rank is a token's; -1 where none."""
        return self.prefix[:-1].masked_fill(self.slots < 0, -1)

    @functools.cached_property
    def prefix(self) -> torch.Tensor:
        """[T + 1, R] int32: how many of the tokens before go to each rank; of all of them last."""
        if self._prefix is not None:
            return self._prefix
        return torch.nn.functional.pad(self.is_token_in_rank.cumsum(0, dtype=torch.int32), (0, 0, 1, 0))

    @functools.cached_property
    def _tuple(self) -> tuple[torch.Tensor, ...]:
        return (
            self.rank_prefix_matrix,
            self.channel_prefix_matrix,
            self.recv_channel_prefix_matrix,
            self.recv_src_idx,
            self.is_token_in_rank,
            self.send_head,
        )

    def __len__(self) -> int:
        return len(self._tuple)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self._tuple)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._tuple[index]
