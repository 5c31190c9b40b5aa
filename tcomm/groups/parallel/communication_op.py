"""Collectives of the current tensor parallel group, as functions."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tcomm.groups.parallel.parallel_state import get_tp_group

__all__ = [
    "broadcast_tensor_dict",
    "tensor_model_parallel_all_gather",
    "tensor_model_parallel_all_reduce",
    "tensor_model_parallel_gather",
    "tensor_model_parallel_reduce_scatter",
]


def tensor_model_parallel_all_reduce(input_: torch.Tensor) -> torch.Tensor:
    """`all_reduce` of the tensor parallel group. **Collective.**"""
    return get_tp_group().all_reduce(input_)


def tensor_model_parallel_all_gather(input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """`all_gather` of the tensor parallel group. **Collective.**"""
    return get_tp_group().all_gather(input_, dim)


def tensor_model_parallel_reduce_scatter(input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """`reduce_scatter` of the tensor parallel group. **Collective.**"""
    return get_tp_group().reduce_scatter(input_, dim)


def tensor_model_parallel_gather(input_: torch.Tensor, dst: int = 0, dim: int = -1) -> torch.Tensor | None:
    """`gather` of the tensor parallel group: the result on rank `dst`, None elsewhere. **Collective.**"""
    return get_tp_group().gather(input_, dst, dim)


def broadcast_tensor_dict(tensor_dict: dict[Any, Any] | None = None, src: int = 0) -> dict[Any, Any] | None:
    """`broadcast_tensor_dict` of the tensor parallel group. **Collective.**

    Without torch.distributed, what was given.
    """
    if not dist.is_initialized():
        return tensor_dict
    return get_tp_group().broadcast_tensor_dict(tensor_dict, src)
