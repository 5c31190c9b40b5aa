"""What a layer of routed experts and the ways of its tokens know of each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import torch

from tcomm.cpu.moe_quantise import dequantise, quantise
from tcomm.errors import ConfigError
from tcomm.groups.moe.workspace import Workspace

__all__ = ["Backend", "Exchange", "Experts", "MoeShape", "OverExchange"]


@dataclasses.dataclass(frozen=True)
class MoeShape:
    """What the layers of a model have in common. The same on every rank.

    Raises:
        ConfigError: when a number makes no sense.
    """

    num_experts: int
    """Of all ranks; rank r has those from `r * num_experts // world_size` on."""
    top_k: int
    """Experts of a token."""
    hidden: int
    """Elements of a token."""
    max_num_tokens: int
    """Tokens of a rank in one call, at most."""
    dtype: torch.dtype
    """Of the tokens."""
    use_fp8: bool = False
    """Send tokens as e4m3 with a scale for 128 elements; results travel in `dtype`."""

    def __post_init__(self) -> None:
        wrong = [
            f"{name}={value!r}"
            for name, value in dataclasses.asdict(self).items()
            if name not in {"dtype", "use_fp8"} and (type(value) is not int or value < 1)
        ]
        if wrong:
            raise ConfigError(f"{', '.join(wrong)}: give whole numbers of at least 1")
        if self.use_fp8 and self.hidden % 128:
            raise ConfigError(f"hidden={self.hidden} with fp8: it has a scale for each 128 elements")

    def pack(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Tokens as they travel: x, or its fp8 elements and their scales."""
        return quantise(x) if self.use_fp8 else (x,)

    def unpack(self, packed: Sequence[torch.Tensor]) -> torch.Tensor:
        """What `pack` was given, in `dtype`."""
        return dequantise(*packed).to(self.dtype) if self.use_fp8 else packed[0]

    @property
    def row_nbytes(self) -> int:
        """Of a packed token."""
        return self.hidden + self.hidden // 128 * 4 if self.use_fp8 else self.hidden * self.dtype.itemsize


class Experts(Protocol):
    """The experts of one rank."""

    def flat(self, x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Weighted sums of experts, row by row.

        Args:
            x: [N, H]; a row without a local expert may hold anything.
            expert_ids: int64 [N, k], local experts; -1: one of another rank, or none.
            weights: float32 [N, k].

        Returns:
            [N, H] of the dtype of x; rows without a local expert are not looked at.
        """
        ...

    def batched(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Each expert on rows of its own.

        Args:
            x: [El, C, H].
            counts: int32 [El], rows of each expert that hold something.

        Returns:
            [El, C, H] of the dtype of x; rows past the count are not looked at.
        """
        ...


class Backend(Protocol):
    """A way for tokens to travel, made for one shape."""

    def forward(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, experts: Experts
    ) -> torch.Tensor:
        """The layer's output for this rank's tokens. **Collective.**

        Args:
            x: [T, H], of the shape's dtype.
            topk_idx: int64 [T, k]; -1: none.
            topk_weights: float32 [T, k].
            experts: of this rank.

        Returns:
            [T, H] of the dtype of x.

        Raises:
            ConfigError: when an argument does not fit the shape.
            CommError: when a peer did not come.
        """
        ...

    @property
    def wire_nbytes(self) -> int:
        """Bytes that this rank has moved to or from others since it was made."""
        ...

    def close(self) -> None:
        """Leave the group and give its memory back. Not collective."""
        ...


class Exchange(Protocol):
    """What the backends over symmetric memory of their own stand on."""

    @property
    def workspace(self) -> Workspace:
        """Its memory, with an account of what moved."""
        ...

    def close(self) -> None:
        """Give the memory back. Not collective."""
        ...


_Exchange = TypeVar("_Exchange", bound=Exchange)


class OverExchange(Generic[_Exchange]):
    """The account and the end of a backend, which are those of its exchange."""

    _exchange: _Exchange

    @property
    def wire_nbytes(self) -> int:
        """As `Backend.wire_nbytes`."""
        return self._exchange.workspace.traffic.wire_nbytes

    def close(self) -> None:
        """As `Backend.close`."""
        self._exchange.close()
