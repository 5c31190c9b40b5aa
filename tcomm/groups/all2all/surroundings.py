"""The groups around an expert group, which are made further up."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch

from tcomm.errors import UsageError

__all__ = ["Coordinator", "among", "current_coordinator", "find_coordinator", "look_up_with"]


class Coordinator(Protocol):
    """What a manager needs of a group, whose ranks are those within it."""

    rank_in_group: int
    world_size: int

    def all_gatherv(
        self, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: list[int] | None = None
    ) -> Any:
        """All ranks' rows. **Collective.**"""

    def reduce_scatterv(
        self, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
    ) -> torch.Tensor:
        """This rank's rows of the sum. **Collective.**"""

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        """The sum. **Collective.**"""

    def broadcast(self, input_: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Rank `src`'s tensor, in place. **Collective.**"""


_Find = Callable[[str], Coordinator | None]
_found_by: list[_Find] = []
_inside: contextvars.ContextVar[_Find | None] = contextvars.ContextVar("tcomm_groups_around", default=None)


def look_up_with(find: _Find) -> None:
    """Have `find` tell which group of a kind is current: called once, where groups are made."""
    _found_by[:] = [find]


@contextlib.contextmanager
def among(groups: Mapping[str, Coordinator], *, alone: bool = False) -> Iterator[None]:
    """Let these be the current groups inside.

    Args:
        groups: by kind; looked into again at every call.
        alone: there are no others, such as those of a state before this one.
    """

    def find(kind: str) -> Coordinator | None:
        return groups.get(kind) or (None if alone else outer(kind))

    outer = _inside.get() or _find_published
    token = _inside.set(find)
    try:
        yield
    finally:
        _inside.reset(token)


def find_coordinator(kind: str) -> Coordinator | None:
    """The current group of a kind, `dp`, `tp`, `pcp` or `ep`; None where there is none."""
    return (_inside.get() or _find_published)(kind)


def _find_published(kind: str) -> Coordinator | None:
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
