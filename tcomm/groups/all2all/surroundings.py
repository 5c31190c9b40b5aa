"""The groups around an expert group, which are made further up."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from tcomm.errors import UsageError

__all__ = ["Coordinator", "among", "current_coordinator", "find_coordinator", "look_up_with"]


class Coordinator(Protocol):
    """What a manager needs of a group, whose ranks are those within it."""

    rank_in_group: int
    world_size: int

    def all_gatherv(
        self, input_: torch.Tensor | Sequence[torch.Tensor], dim: int = 0, sizes: Sequence[int] | None = None
    ) -> Any:
        """All ranks' rows. **Collective.**"""

    def reduce_scatterv(
        self, input_: torch.Tensor, dim: int = -1, sizes: Sequence[int] | None = None
    ) -> torch.Tensor:
        """This rank's rows of the sum. **Collective.**"""

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        """The sum. **Collective.**"""

    def broadcast(self, input_: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Rank `src`'s tensor, in place. **Collective.**"""


_found_by: list[Callable[[str], Coordinator | None]] = []
_being_made: contextvars.ContextVar[Mapping[str, Coordinator] | None] = contextvars.ContextVar(
    "tcomm_groups_being_made", default=None
)


def look_up_with(find: Callable[[str], Coordinator | None]) -> None:
    """Have `find` tell which group of a kind is current: called once, where groups are made."""
    _found_by[:] = [find]


@contextlib.contextmanager
def among(made: Mapping[str, Coordinator]) -> Iterator[None]:
    """Let these be the current groups inside: those made so far, before any is published."""
    token = _being_made.set(made)
    try:
        yield
    finally:
        _being_made.reset(token)


def find_coordinator(kind: str) -> Coordinator | None:
    """The current group of a kind, `dp`, `tp`, `pcp` or `ep`; None where there is none."""
    made = _being_made.get()
    if made is not None:
        return made.get(kind)
    return _found_by[0](kind) if _found_by else None


def current_coordinator(kind: str) -> Coordinator:
    """`find_coordinator`, where there has to be one.

    Raises:
        UsageError: when there is none.
    """
    found = find_coordinator(kind)
    if found is None:
        raise UsageError(
            f"there is no {kind.upper()} group, which tokens are to be exchanged in; call "
            "initialize_model_parallel() first"
        )
    return found
