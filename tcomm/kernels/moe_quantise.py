"""Rows to fp8 as they are sent: the twin of `tcomm.cpu.moe_quantise`, with the same bits.

Source: the arithmetic is that of the specification of DeepEP's low-latency dispatch. Meaning:
`tcomm.cpu.moe_quantise.quantise`.
"""

import torch
import triton
import triton.language as tl

from tcomm.kernels.device import INTERPRETED
from tcomm.memory.moe_slots import AMAX_FLOOR, FP8_MAX

__all__ = ["e4m3", "has_e4m3", "pack_exponents", "scaled_groups"]

_FP8_MAX = tl.constexpr(FP8_MAX)
_FLOOR_BITS = tl.constexpr(int(torch.tensor(AMAX_FLOOR, device="cpu").view(torch.int32)))
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_MANTISSA = tl.constexpr(0x7FFFFF)
_MOST_EXPONENT = tl.constexpr(254)
# Adding it puts the ninth binary place of a small number into the last one of the sum.
_SHIFTER = tl.constexpr(16384.0)
_SHIFTER_BITS = tl.constexpr(0x46800000)
_SMALLEST_NORMAL_BITS = tl.constexpr(121 << 23)
_LARGEST_CODE, _NAN_CODE = tl.constexpr(0x7E), tl.constexpr(0x7F)
_INFINITY_BITS = tl.constexpr(0x7F800000)


def has_e4m3(device: torch.device) -> bool:
    """Whether the device rounds to e4m3 by an instruction; elsewhere integers do it."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def scaled_groups(x, ROUND: tl.constexpr):
    """Numbers [G, 128] in fp32, scaled for e4m3, and for each group its scale and the exponent of that.

    The exponent, biased, counts where scales are rounded to powers of two.
    """
    # As integers, magnitudes are ordered as they are as numbers, and NaN is above all of them.
    bits = x.to(tl.int32, bitcast=True) & _MAGNITUDE
    amax = tl.maximum(tl.max(bits, axis=1), _FLOOR_BITS).to(tl.float32, bitcast=True)
    largest = tl.full(amax.shape, _FP8_MAX, tl.float32)
    scale = tl.div_rn(amax, largest)
    scale_bits = scale.to(tl.int32, bitcast=True)
    above = (scale_bits >> 23) + ((scale_bits & _MANTISSA) != 0).to(tl.int32)
    exponent = tl.minimum(above, _MOST_EXPONENT)
    if ROUND:
        scale = (exponent << 23).to(tl.float32, bitcast=True)
        factor = ((-exponent + _MOST_EXPONENT) << 23).to(tl.float32, bitcast=True)
    else:
        factor = tl.div_rn(largest, amax)
    return x * factor[:, None], scale, exponent


@triton.jit
def e4m3(value, BY_INSTRUCTION: tl.constexpr):
    """fp32 numbers as the bytes of e4m3, to nearest even; what is above 448 becomes 448.

    The interpreter's own cast loses a carry and flushes subnormal numbers.
    """
    if BY_INSTRUCTION and not INTERPRETED:
        return value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = value.to(tl.int32, bitcast=True)
        magnitude = bits & _MAGNITUDE
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        small = (tl.abs(value) + _SHIFTER).to(tl.int32, bitcast=True) - _SHIFTER_BITS
        code = tl.where(magnitude < _SMALLEST_NORMAL_BITS, small, tl.minimum(normal, _LARGEST_CODE))
        code = tl.where(magnitude > _INFINITY_BITS, _NAN_CODE, code)
        return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def pack_exponents(exponents, GROUPS: tl.constexpr):
    """[GROUPS / 4] words of [GROUPS] exponents, the first in the lowest byte."""
    fours = tl.reshape(exponents, (GROUPS // 4, 4))
    return tl.sum(fours << (8 * tl.arange(0, 4))[None, :], axis=1)
