"""The older names of torch.distributed, in its order of arguments. Deprecated there, and here."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from tcomm.groups.gathers import Gathers
from tcomm.groups.reductions import Reductions
from tcomm.groups.transfers import Transfers

__all__ = ["Aliases"]


class Aliases(Reductions, Gathers, Transfers):
    """All verbs, and older names of some."""

    def all_gather_into_tensor(self, output: torch.Tensor, x: torch.Tensor, **options: Any) -> Any:
        """`all_gather_single(x, out=output)`. **Collective.**

        Args:
            output: [W * N, ...].
            x: [N, ...].
            options: as for `all_gather_single`.
        """
        _deprecate("all_gather_into_tensor(output, x)", "all_gather_single(x, out=output)")
        return self.all_gather_single(x, out=output, **options)

    def reduce_scatter_tensor(
        self, output: torch.Tensor, x: torch.Tensor, op: object = "sum", **options: Any
    ) -> Any:
        """`reduce_scatter_single(x, op, out=output)`. **Collective.**

        Args:
            output: [N, ...].
            x: [W * N, ...].
            op: as for `all_reduce`.
            options: as for `reduce_scatter_single`.
        """
        _deprecate("reduce_scatter_tensor(output, x, op)", "reduce_scatter_single(x, op, out=output)")
        return self.reduce_scatter_single(x, op, out=output, **options)


def _deprecate(old: str, new: str) -> None:
    warnings.warn(f"{old} is the older name; call {new}", DeprecationWarning, stacklevel=3)
