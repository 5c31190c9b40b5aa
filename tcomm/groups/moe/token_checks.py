"""Checks of what is dispatched and combined, before anything is published."""

from __future__ import annotations

import torch

from tcomm.errors import ConfigError
from tcomm.groups.arguments import check_tensor, dtype_name
from tcomm.groups.moe.expert_ids import MOST_ROWS, check_expert_ids
from tcomm.groups.moe.routing import Routing, check_topk_shape

__all__ = ["check_choices", "check_placed", "check_results", "check_rounding", "check_tokens"]

_PAYLOADS = {torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn}
_SUMMED = {torch.bfloat16, torch.float16, torch.float32}
_SCALE_BLOCK = 128
_SCALES_A_WORD = 4
_MOST_BIAS = 2
_ROWS_AND_SCALES = 2


def check_tokens(
    x: torch.Tensor | tuple[torch.Tensor, torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows and scales of what is dispatched; see `HighThroughput.dispatch`.

    Raises:
        ConfigError: when shapes, dtypes or devices are wrong.
    """
    if isinstance(x, tuple) and len(x) != _ROWS_AND_SCALES:
        raise ConfigError(f"x is a tuple of {len(x)}; give rows, or rows and their scales")
    rows, scales = x if isinstance(x, tuple) else (x, None)
    _check_rows("x", rows, _PAYLOADS, device)
    is_narrow = rows.dtype == torch.float8_e4m3fn
    if is_narrow != (scales is not None):
        told = "without" if is_narrow else "with"
        raise ConfigError(f"x is {rows.dtype} {told} scales; fp8 has scales, and nothing else has")
    if scales is None:
        return rows, None
    check_placed("x's tensor of scales", scales, device)
    groups = rows.shape[1] // _SCALE_BLOCK
    wanted = {torch.float32: groups, torch.int32: -(-groups // _SCALES_A_WORD)}
    if rows.shape[1] % _SCALE_BLOCK or scales.shape != (len(rows), wanted.get(scales.dtype)):
        raise ConfigError(
            f"x is fp8 {list(rows.shape)} with scales {scales.dtype} {list(scales.shape)}; give hidden a "
            f"multiple of {_SCALE_BLOCK}, and scales float32 [T, H / 128] or int32 [T, ceil(H / 512)]"
        )
    return rows, scales.contiguous()


def check_choices(
    num_tokens: int,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    num_experts: int,
    world_size: int,
    handle: Routing | None,
    device: torch.device,
    *,
    may_wait: bool = True,
) -> None:
    """Check what says where tokens go: a router's choice, or an earlier dispatch.

    Values are looked at where they are in host memory, or `may_wait` allows to wait for a GPU.

    Raises:
        ConfigError: when it is neither or both, or does not fit the tokens.
    """
    if handle is not None:
        _check_handle(handle, world_size)
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
    check_topk_shape(topk_idx, num_experts, world_size)
    _check_beside("topk_idx", topk_idx, (num_tokens, topk_idx.shape[1]), torch.int64, device)
    if may_wait or device.type == "cpu":
        check_expert_ids(topk_idx, num_experts)
    if topk_weights is not None:
        _check_beside("topk_weights", topk_weights, tuple(topk_idx.shape), torch.float32, device)


def check_rounding(expert_alignment: int, num_worst_tokens: int) -> None:
    """Check the numbers that say how results are rounded up.

    Raises:
        ConfigError: when they are no such numbers.
    """
    if type(expert_alignment) is not int or expert_alignment < 1:
        raise ConfigError(f"expert_alignment={expert_alignment!r} is not a number of at least 1")
    if type(num_worst_tokens) is not int or not 0 <= num_worst_tokens < MOST_ROWS:
        raise ConfigError(
            f"num_worst_tokens={num_worst_tokens!r} is not a number of rows; 0: as many as come"
        )


def check_results(
    x: torch.Tensor,
    handle: Routing,
    topk_weights: torch.Tensor | None,
    bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None,
    world_size: int,
    device: torch.device,
) -> list[torch.Tensor]:
    """The tensors of `bias`, when all that is combined fits together; see `HighThroughput.combine`.

    Raises:
        ConfigError: when it does not.
    """
    _check_handle(handle, world_size)
    _check_rows("x", x, _SUMMED, device)
    if len(x) != handle.num_rows:
        raise ConfigError(f"x has {len(x)} rows, the dispatch of the handle gave {handle.num_rows}")
    if topk_weights is not None:
        _check_beside("topk_weights", topk_weights, (len(x), handle.num_topk), torch.float32, device)
    if not isinstance(bias, torch.Tensor | tuple | list | None):
        raise ConfigError(f"bias is a {type(bias).__name__}; give a tensor, two of them, or None")
    terms = [] if bias is None else [bias] if isinstance(bias, torch.Tensor) else list(bias)
    if len(terms) > _MOST_BIAS:
        raise ConfigError(f"bias has {len(terms)} tensors; give none, one or two")
    for term in terms:
        _check_beside("bias", term, (handle.num_tokens, x.shape[1]), x.dtype, device)
    return terms


def check_placed(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Check that it is a dense tensor with memory where the exchange has its own.

    Raises:
        ConfigError: when it is not, or its gradient would be lost.
    """
    check_tensor(name, tensor)
    if tensor.device.type != device.type:
        raise ConfigError(f"{name} is on {tensor.device}, and the buffer is for tensors on {device}")


def _check_rows(name: str, rows: torch.Tensor, dtypes: set[torch.dtype], device: torch.device) -> None:
    check_placed(name, rows, device)
    if rows.dim() != 2 or not rows.is_contiguous():
        raise ConfigError(f"{name} is {list(rows.shape)}; give a contiguous tensor [rows, hidden]")
    if rows.dtype not in dtypes or rows.shape[1] % 8 or not rows.shape[1]:
        names = ", ".join(sorted(map(dtype_name, dtypes)))
        raise ConfigError(f"{name} is {rows.dtype} {list(rows.shape)}; give {names}, hidden a multiple of 8")


def _check_beside(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    check_placed(name, tensor, device)
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ConfigError(f"{name} is {tensor.dtype} {list(tensor.shape)}; give {dtype} {list(shape)}")


def _check_handle(handle: Routing, world_size: int) -> None:
    if not isinstance(handle, Routing):
        raise ConfigError(f"handle is a {type(handle).__name__}; give the one that a dispatch returned")
    if handle.slots.shape[1] != world_size:
        raise ConfigError(f"the handle is of {handle.slots.shape[1]} ranks, and the buffer of {world_size}")
