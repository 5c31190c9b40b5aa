import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tcomm.cpu.moe_quantise import quantise
from tcomm.kernels.moe_quantise import e4m3, has_e4m3, pack_exponents, scaled_groups
from tests.cpu.test_moe_quantise import rows


@triton.jit
def _quantise_kernel(x_ptr, q_ptr, scale_ptr, word_ptr, ROUND: tl.constexpr):
    groups = tl.program_id(0) * 8 + tl.arange(0, 8)
    offs = groups[:, None] * 128 + tl.arange(0, 128)[None, :]
    scaled, scale, exponent = scaled_groups(tl.load(x_ptr + offs).to(tl.float32), ROUND)
    tl.store(q_ptr + offs, e4m3(scaled, False))
    tl.store(scale_ptr + groups, scale)
    tl.store(word_ptr + tl.program_id(0) * 2 + tl.arange(0, 2), pack_exponents(exponent, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("round_scale", [False, True])
def test_kernels_have_the_bits_of_the_host(dtype, round_scale):
    x = rows(dtype, 1024).contiguous()
    x[9, 3] = float("nan")
    q = torch.zeros(64, 1024, dtype=torch.uint8)
    scales, words = torch.zeros(64, 8), torch.zeros(64, 2, dtype=torch.int32)
    _quantise_kernel[(64,)](x, q, scales, words, round_scale)
    wanted, wanted_scales = quantise(x, round_scale=round_scale)
    # Of NaN the sign is open.
    same = (q == wanted.view(torch.uint8)) | ((q & 0x7F == 0x7F) & wanted.float().isnan())
    assert same.all()
    assert torch.equal(scales.nan_to_num(-1), wanted_scales.nan_to_num(-1))
    if round_scale:
        assert torch.equal(words, quantise(x, round_scale=True, use_ue8m0=True)[1])


@triton.jit
def _encode_kernel(x_ptr, q_ptr):
    offs = tl.program_id(0) * 65536 + tl.arange(0, 65536)
    tl.store(q_ptr + offs, e4m3(tl.load(x_ptr + offs), False))


def test_every_upper_half_of_a_number_is_rounded_as_by_torch():
    # The lower half decides nothing but ties, of which it makes some.
    bits = torch.arange(65536).mul(65536).add(torch.tensor([[0], [1], [32768]])).to(torch.int32)
    x = bits.view(torch.float32)
    x = torch.where(x.abs() > 464, 464 * x.sign(), x).contiguous()
    q = torch.zeros(x.shape, dtype=torch.uint8)
    with np.errstate(all="ignore"):
        _encode_kernel[(3,)](x, q)
    wanted = x.to(torch.float8_e4m3fn).view(torch.uint8)
    assert ((q == wanted) | (x.isnan() & (q & 0x7F == 0x7F))).all()


def test_the_host_rounds_by_integers():
    assert not has_e4m3(torch.device("cpu"))
