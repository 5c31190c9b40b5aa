"""Telling autograd of tensors that were written behind its back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import _C

__all__ = ["increment_versions"]

increment_versions: Callable[[Sequence[torch.Tensor]], None] = _C._increment_version
"""What `torch.autograd.graph.increment_version` calls, in half of its time: short collectives feel it."""
