"""Checks of what is dispatched and combined, before anything is published."""

from __future__ import annotations

import torch

from tcomm.errors import ConfigError
from tcomm.groups.arguments import dtype_name
from tcomm.groups.moe.routing import Routing, check_topk

__all__ = ["check_choices", "check_results", "check_rounding", "check_tokens"]

_PAYLOADS = {torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn}
_SUMMED = {torch.bfloat16, torch.float16, torch.float32}
_SCALE_BLOCK = 128
_SCALES_A_WORD = 4
_MOST_BIAS = 2


def check_tokens(
    x: torch.Tensor | tuple[torch.Tensor, torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows and scales of what is dispatched; see `HighThroughput.dispatch`.

    Raises:
        ConfigError: when shapes, dtypes or devices are wrong.
    """
    rows, scales = x if isinstance(x, tuple) else (x, None)
    _check_rows("x", rows, _PAYLOADS, device)
    is_narrow = rows.dtype == torch.float8_e4m3fn
    if is_narrow != (scales is not None):
        told = "without" if is_narrow else "with"
        raise ConfigError(f"x is {rows.dtype} {told} scales; fp8 has scales, and nothing else has")
    if scales is None:
        return rows, None
    groups = rows.shape[1] // _SCALE_BLOCK
    wanted = {torch.float32: groups, torch.int32: -(-groups // _SCALES_A_WORD)}
    if rows.shape[1] % _SCALE_BLOCK or scales.shape != (len(rows), wanted.get(scales.dtype)):
        raise ConfigError(
            f"x is fp8 {list(rows.shape)} with scales {scales.dtype} {list(scales.shape)}; give a hidden size "
            f"that is a multiple of {_SCALE_BLOCK}, and scales float32 [T, H / 128] or int32 [T, ceil(H / 512)]"
        )
    return rows, scales.contiguous()


def check_choices(
    num_tokens: int,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    num_experts: int,
    world_size: int,
    handle: Routing | None,
) -> None:
    """Check what says where tokens go: a router's choice, or an earlier dispatch.

    Raises:
        ConfigError: when it is neither or both, or does not fit the tokens.
    """
    if handle is not None:
        _check_handle(handle)
        if topk_idx is not None or topk_weights is not None:
            raise ConfigError(
                "a cached dispatch takes no topk_idx and no topk_weights: its handle stands for them"
            )
        if handle.num_tokens != num_tokens:
            raise ConfigError(
                f"x has {num_tokens} tokens, the dispatch of the handle had {handle.num_tokens}"
            )
        return
    if topk_idx is None:
        raise ConfigError("a dispatch needs topk_idx, or the handle of an earlier one")
    check_topk(topk_idx, num_experts, world_size)
    _check_beside("topk_idx", topk_idx, (num_tokens, topk_idx.shape[1]), torch.int64)
    if topk_weights is not None:
        _check_beside("topk_weights", topk_weights, tuple(topk_idx.shape), torch.float32)


def check_rounding(expert_alignment: int, num_worst_tokens: int) -> None:
    """Check the numbers that say how results are rounded up.

    Raises:
        ConfigError: when they are no such numbers.
    """
    if type(expert_alignment) is not int or expert_alignment < 1:
        raise ConfigError(f"expert_alignment={expert_alignment!r} is not a number of at least 1")
    if type(num_worst_tokens) is not int or num_worst_tokens < 0:
        raise ConfigError(
            f"num_worst_tokens={num_worst_tokens!r} is not a number of rows; 0: as many as come"
        )


def check_results(
    x: torch.Tensor,
    handle: Routing,
    topk_weights: torch.Tensor | None,
    bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None,
    device: torch.device,
) -> list[torch.Tensor]:
    """The tensors of `bias`, when all that is combined fits together; see `HighThroughput.combine`.

    Raises:
        ConfigError: when it does not.
    """
    _check_handle(handle)
    _check_rows("x", x, _SUMMED, device)
    if len(x) != handle.num_rows:
        raise ConfigError(f"x has {len(x)} rows, the dispatch of the handle gave {handle.num_rows}")
    if topk_weights is not None:
        _check_beside("topk_weights", topk_weights, (len(x), handle.num_topk), torch.float32)
    terms = [] if bias is None else [bias] if isinstance(bias, torch.Tensor) else list(bias)
    if len(terms) > _MOST_BIAS:
        raise ConfigError(f"bias has {len(terms)} tensors; give none, one or two")
    for term in terms:
        _check_beside("bias", term, (handle.num_tokens, x.shape[1]), x.dtype)
    return terms


def _check_rows(name: str, rows: torch.Tensor, dtypes: set[torch.dtype], device: torch.device) -> None:
    if not isinstance(rows, torch.Tensor) or rows.dim() != 2 or not rows.is_contiguous():
        shape = list(rows.shape) if isinstance(rows, torch.Tensor) else repr(rows)
        raise ConfigError(f"{name} is {shape}; give a contiguous tensor [rows, hidden]")
    if rows.dtype not in dtypes or rows.shape[1] % 8 or not rows.shape[1]:
        names = ", ".join(sorted(map(dtype_name, dtypes)))
        raise ConfigError(
            f"{name} is {rows.dtype} {list(rows.shape)}; give {names}, and a hidden size that is a multiple of 8"
        )
    if rows.device.type != device.type:
        raise ConfigError(f"{name} is on {rows.device}, and the buffer is for tensors on {device}")


def _check_beside(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ConfigError(f"{name} is {tensor.dtype} {list(tensor.shape)}; give {dtype} {list(shape)}")


def _check_handle(handle: Routing) -> None:
    if not isinstance(handle, Routing):
        raise ConfigError(f"handle is a {type(handle).__name__}; give the one that a dispatch returned")
