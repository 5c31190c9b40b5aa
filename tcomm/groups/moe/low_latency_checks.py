"""Checks of what low-latency calls are given, before an epoch is taken."""

from __future__ import annotations

import torch

from tcomm.errors import ConfigError
from tcomm.groups.arguments import check_out, check_tensor, dtype_name
from tcomm.groups.moe.expert_ids import check_divides, check_expert_ids
from tcomm.memory.moe_slots import GROUP, SlotLayout

__all__ = [
    "check_choices", "check_combine", "check_dispatch", "check_sizes_of_exchange", "check_statistics",
]  # fmt: skip

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CHANNELS_AT_LEAST = 8


def check_sizes_of_exchange(
    num_max_tokens: int, hidden: int, num_experts: int, max_topk: int, dtype: torch.dtype, world_size: int
) -> None:
    """Check the capacity of an exchange.

    Raises:
        ConfigError: when a size makes no sense.
    """
    sizes = {
        "num_max_tokens": num_max_tokens, "hidden": hidden, "num_experts": num_experts, "max_topk": max_topk,
    }  # fmt: skip
    if wrong := [f"{name}={value!r}" for name, value in sizes.items() if type(value) is not int or value < 1]:
        raise ConfigError(f"{', '.join(wrong)}: give positive integers")
    if hidden % _CHANNELS_AT_LEAST:
        raise ConfigError(f"hidden={hidden} is no multiple of {_CHANNELS_AT_LEAST}")
    check_divides(num_experts, world_size)
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype} is none of {', '.join(map(dtype_name, _DTYPES))}")


def check_dispatch(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    layout: SlotLayout,
    dtype: torch.dtype,
    device: torch.device,
    scaling: tuple[bool, bool, bool],
) -> None:
    """Check tokens and choices.

    Args:
        x: of the call.
        topk_idx: of the call.
        layout: of the exchange.
        dtype: of the exchange.
        device: of the exchange.
        scaling: use_fp8, round_scale, use_ue8m0.

    Raises:
        ConfigError: when they do not fit the exchange; an expert out of range is named with its token.
    """
    check_tensor("low_latency dispatch", x)
    if x.dim() != 2 or x.shape[1] != layout.hidden or x.dtype != dtype or x.device.type != device.type:
        raise ConfigError(
            f"x is {dtype_name(x.dtype)} {list(x.shape)} on {x.device}; give {dtype_name(dtype)} "
            f"[T, {layout.hidden}] on {device}"
        )
    if len(x) > layout.max_tokens:
        raise ConfigError(
            f"{len(x)} tokens pass the capacity of {layout.max_tokens} tokens a rank; give them in several "
            "calls, or make an exchange of a larger num_max_tokens"
        )
    check_choices(topk_idx, len(x), layout, device)
    use_fp8, round_scale, use_ue8m0 = scaling
    if use_fp8 and layout.hidden % GROUP:
        raise ConfigError(f"use_fp8 needs a hidden size that is a multiple of {GROUP}, not {layout.hidden}")
    if use_fp8 and use_ue8m0 and not round_scale:
        raise ConfigError("use_ue8m0 gives scales as exponents, so it needs round_scale=True")


def check_choices(topk_idx: torch.Tensor, num_tokens: int, layout: SlotLayout, device: torch.device) -> None:
    """Check choices. On a GPU their values are not looked at: one out of range counts as none.

    Raises:
        ConfigError: naming the token of an expert out of range.
    """
    check_tensor("topk_idx", topk_idx)
    if topk_idx.dtype != torch.int64 or topk_idx.dim() != 2 or len(topk_idx) != num_tokens:
        raise ConfigError(
            f"topk_idx is {dtype_name(topk_idx.dtype)} {list(topk_idx.shape)}; give int64 [{num_tokens}, k]"
        )
    if topk_idx.device.type != device.type:
        raise ConfigError(f"topk_idx is on {topk_idx.device}, the exchange on {device}")
    if not 1 <= topk_idx.shape[1] <= layout.max_topk:
        raise ConfigError(
            f"{topk_idx.shape[1]} choices a token; the exchange was made for 1 to {layout.max_topk}"
        )
    if device.type == "cpu":
        check_expert_ids(topk_idx, layout.world_size * layout.num_local_experts)


def check_statistics(
    stats: torch.Tensor | None,
    name: str,
    dtype: torch.dtype,
    shapes: tuple[tuple[int, ...], ...],
    device: torch.device,
) -> None:
    """Check a tensor that a call adds to.

    Raises:
        ConfigError: when it has another dtype or device, none of these shapes, or is not contiguous.
    """
    if stats is None:
        return
    check_tensor(name, stats)
    fits = stats.dtype == dtype and tuple(stats.shape) in shapes and stats.device.type == device.type
    if not fits or not stats.is_contiguous():
        told = " or ".join(str(list(shape)) for shape in shapes)
        raise ConfigError(
            f"{name} is {dtype_name(stats.dtype)} {list(stats.shape)} on {stats.device}; give "
            f"{dtype_name(dtype)} {told} on {device}, contiguous"
        )


def check_combine(
    y: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    out: torch.Tensor | None,
    sent: torch.Tensor,
    layout: SlotLayout,
    dtype: torch.dtype,
) -> None:
    """Check what experts gave, and the choices and weights.

    Raises:
        ConfigError: when they do not fit the dispatch.
    """
    check_tensor("low_latency combine", y)
    shape = [layout.num_local_experts, layout.capacity, layout.hidden]
    if list(y.shape) != shape or y.dtype != dtype or _is_away(y, sent):
        raise ConfigError(
            f"x is {dtype_name(y.dtype)} {list(y.shape)} on {y.device}; give {dtype_name(dtype)} {shape} on "
            f"{sent.device}"
        )
    check_choices(topk_idx, len(sent), layout, sent.device)
    if topk_idx.shape != sent.shape:
        raise ConfigError(f"topk_idx is {list(topk_idx.shape)}; its dispatch had {list(sent.shape)}")
    if sent.device.type == "cpu" and ((topk_idx != sent) & (topk_idx >= 0)).any():
        token = int(((topk_idx != sent) & (topk_idx >= 0)).any(1).nonzero()[0])
        raise ConfigError(f"token {token} chooses other experts than it was dispatched to")
    check_tensor("topk_weights", topk_weights, loses_gradient=False)
    if (
        topk_weights.dtype != torch.float32
        or topk_weights.shape != sent.shape
        or _is_away(topk_weights, sent)
    ):
        raise ConfigError(
            f"topk_weights is {dtype_name(topk_weights.dtype)} {list(topk_weights.shape)} on "
            f"{topk_weights.device}; give float32 {list(sent.shape)} on {sent.device}"
        )
    if out is not None:
        check_out("low_latency combine", y, out, (len(sent), layout.hidden), may_alias=False)
        if not out.is_contiguous():
            raise ConfigError(f"out is {list(out.shape)} of strides {out.stride()}; give it contiguous")


def _is_away(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return tensor.device.type != other.device.type
