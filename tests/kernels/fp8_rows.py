"""The fp8 arithmetic of kernels, by kernels of its own, on any device."""

import numpy as np
import torch
import triton
import triton.language as tl

from tcomm.cpu.moe_quantise import quantise
from tcomm.interpret import is_interpreted
from tcomm.kernels.moe_quantise import e4m3, has_e4m3, pack_exponents, scaled_groups
from tests.cpu.test_moe_quantise import rows
from tests.kernels.virtual_arenas import device_of


@triton.jit
def _quantise_kernel(x_ptr, q_ptr, scale_ptr, word_ptr, ROUND: tl.constexpr, BY_INSTRUCTION: tl.constexpr):
    groups = tl.program_id(0) * 8 + tl.arange(0, 8)
    offs = groups[:, None] * 128 + tl.arange(0, 128)[None, :]
    scaled, scale, exponent = scaled_groups(tl.load(x_ptr + offs).to(tl.float32), ROUND)
    tl.store(q_ptr + offs, e4m3(scaled, BY_INSTRUCTION))
    tl.store(scale_ptr + groups, scale)
    tl.store(word_ptr + tl.program_id(0) * 2 + tl.arange(0, 2), pack_exponents(exponent, 8))


@triton.jit
def _encode_kernel(x_ptr, q_ptr, BLOCK: tl.constexpr, BY_INSTRUCTION: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(q_ptr + offs, e4m3(tl.load(x_ptr + offs), BY_INSTRUCTION))


def ways_of(device):
    """Ways to round that a device has: by integers, and by an instruction."""
    return (False, True) if has_e4m3(device_of(device)) else (False,)


def check_quantise(device, dtype, round_scale, by_instruction=False):
    """Kernels have the bits of the host."""
    device, x = device_of(device), rows(dtype, 1024).contiguous()
    x[9, 3] = float("nan")
    q = torch.zeros(64, 1024, dtype=torch.uint8, device=device)
    scales = torch.zeros(64, 8, device=device)
    words = torch.zeros(64, 2, dtype=torch.int32, device=device)
    _quantise_kernel[(64,)](x.to(device), q, scales, words, round_scale, by_instruction)
    q, scales, words = q.cpu(), scales.cpu(), words.cpu()
    wanted, wanted_scales = quantise(x, round_scale=round_scale)
    # Of NaN the sign is open.
    same = (q == wanted.view(torch.uint8)) | ((q & 0x7F == 0x7F) & wanted.float().isnan())
    assert same.all()
    assert torch.equal(scales.nan_to_num(-1), wanted_scales.nan_to_num(-1))
    if round_scale:
        assert torch.equal(words, quantise(x, round_scale=True, use_ue8m0=True)[1])


def check_encode(device, by_instruction=False):
    """Every upper half of a number is rounded as by torch on the host."""
    # The lower half decides nothing but ties, of which it makes some.
    bits = torch.arange(65536).mul(65536).add(torch.tensor([[0], [1], [32768]])).to(torch.int32)
    x = bits.view(torch.float32)
    x = torch.where(x.abs() > 464, 464 * x.sign(), x).contiguous()
    q = torch.zeros(x.shape, dtype=torch.uint8, device=device)
    block = 65536 if is_interpreted() else 1024
    with np.errstate(all="ignore"):
        _encode_kernel[(x.numel() // block,)](x.to(device), q, block, by_instruction)
    wanted, q = x.to(torch.float8_e4m3fn).view(torch.uint8), q.cpu()
    assert ((q == wanted) | (x.isnan() & (q & 0x7F == 0x7F))).all()
