"""Rows to fp8 and back: e4m3 values, and a scale for each group of 128 channels."""

from __future__ import annotations

import torch

from tcomm.memory.moe_slots import AMAX_FLOOR, FP8_MAX, GROUP

__all__ = ["dequantise", "quantise"]

_MANTISSA_BITS, _MANTISSA = 23, 0x7FFFFF
_MOST_EXPONENT = 254


def quantise(
    x: torch.Tensor, *, round_scale: bool = False, use_ue8m0: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round rows to e4m3, scaled so that the largest number of each group becomes 448.

    A NaN makes its group NaN. For one group: amax = max(largest magnitude, 1e-4), scale = amax / 448,
    q = x * (448 / amax), to nearest even, in fp32.

    Example: a group whose largest magnitude is 3.0 has scale 3 / 448 = 0.006696; with `round_scale` 2**-7 =
    0.0078125, whose exponent byte is 120.

    Args:
        x: [..., H], H a multiple of 128; bfloat16, float16 or float32.
        round_scale: take the power of two at or above amax / 448 as the scale.
        use_ue8m0: give the scales as their exponents, four to a word; needs `round_scale`.

    Returns:
        (float8_e4m3fn [..., H], scales): float32 [..., H / 128], or int32 [..., ceil(H / 512)] in which the
        exponent of group g is byte g % 4 of word g // 4, and bytes without a group are 0.
    """
    groups = x.float().unflatten(-1, (-1, GROUP))
    amax = groups.abs().amax(-1).clamp_min_(AMAX_FLOOR)
    scales = amax / FP8_MAX
    if round_scale:
        exponents = _exponents_above(scales)
        scales = (exponents << _MANTISSA_BITS).view(torch.float32)
        factors = (_MOST_EXPONENT - exponents << _MANTISSA_BITS).view(torch.float32)
    else:
        # A number over a tensor would be a product with its reciprocal, rounded twice.
        factors = torch.full_like(amax, FP8_MAX).div_(amax)
    q = groups.mul(factors.unsqueeze(-1)).flatten(-2).to(torch.float8_e4m3fn)
    return q, _pack(exponents) if use_ue8m0 else scales


def dequantise(q: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What `quantise` made of a tensor, in float32.

    Args:
        q: [..., H] of any type, fp8 as a rule.
        scales: as `quantise` gives them; need not be contiguous.
    """
    num_groups = q.shape[-1] // GROUP
    if scales.dtype == torch.int32:
        # A last dimension of one is contiguous for torch at any stride.
        words = scales.clone(memory_format=torch.contiguous_format)
        exponents = words.view(torch.uint8)[..., :num_groups].to(torch.int32)
        scales = (exponents << _MANTISSA_BITS).view(torch.float32)
    groups: torch.Tensor = q.float().unflatten(-1, (-1, GROUP))
    return groups.mul(scales.unsqueeze(-1)).flatten(-2)


def _exponents_above(scales: torch.Tensor) -> torch.Tensor:
    """Biased exponent of the power of two at or above each positive number."""
    bits = scales.view(torch.int32)
    above = (bits >> _MANTISSA_BITS) + (bits & _MANTISSA != 0)
    return above.clamp_max(_MOST_EXPONENT).to(torch.int32)


def _pack(exponents: torch.Tensor) -> torch.Tensor:
    missing = -exponents.shape[-1] % 4
    return torch.nn.functional.pad(exponents.to(torch.uint8), (0, missing)).view(torch.int32)
