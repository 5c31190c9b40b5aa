import math

import pytest
import torch

from tcomm.cpu.moe_quantise import dequantise, quantise
from tcomm.memory.moe_slots import AMAX_FLOOR, FP8_MAX

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
E4M3 = E4M3[E4M3.isfinite()].unique()


def rows(dtype=torch.bfloat16, hidden=640):
    """Groups of all sizes, with zeros, subnormals, ties and numbers below the floor."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(64, hidden, generator=generator) * 10.0 ** torch.randint(
        -8, 9, (64, 1), generator=generator
    )
    x[0] = 0
    x[1, :128] = 448.0
    x[2, :128] = torch.linspace(-448, 448, 128)
    x[3, :128] = torch.arange(128) * 2.0**-10
    x[4] = 1e-5
    x[5] = torch.finfo(torch.float32 if dtype == torch.float32 else torch.bfloat16).max
    x[6, ::2] *= -1
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("round_scale", [False, True])
def test_each_number_becomes_the_nearest_that_its_group_has(dtype, round_scale):
    x = rows(dtype)
    q, scales = quantise(x, round_scale=round_scale)
    assert (q.dtype, q.shape, scales.dtype, scales.shape) == (
        torch.float8_e4m3fn, x.shape, torch.float32, (64, 5),
    )  # fmt: skip
    groups = x.double().unflatten(-1, (-1, 128))
    amax = groups.abs().amax(-1).clamp_min(AMAX_FLOOR)
    wanted = amax / FP8_MAX
    if round_scale:
        powers = [2.0 ** math.ceil(math.log2(w)) for w in wanted.flatten()]
        wanted = torch.tensor(powers, dtype=torch.float64).view(wanted.shape)
    assert torch.allclose(scales.double(), wanted, rtol=2.0**-23 if not round_scale else 0.0, atol=0.0)
    # Half the distance of the two e4m3 numbers around each quotient, and what the division rounds away.
    quotients = (groups / scales.double().unsqueeze(-1)).flatten(-2)
    upper = E4M3.double()[torch.searchsorted(E4M3.double(), quotients.clamp(-448, 448).contiguous())]
    ulp = 2.0 ** (torch.log2(upper.abs().clamp_min(2.0**-6)).floor() - 3)
    assert ((q.double() - quotients).abs() <= ulp / 2 + quotients.abs() * 2.0**-22).all()
    assert torch.equal(
        dequantise(q, scales), (q.float().unflatten(-1, (-1, 128)) * scales[..., None]).flatten(-2)
    )


def test_a_group_of_nothing_has_the_scale_of_the_floor():
    q, scales = quantise(torch.zeros(2, 128))
    assert scales.unique().tolist() == [torch.tensor(1e-4).div(448).item()]
    assert not q.float().any()


def test_exponents_are_packed_four_to_a_word_and_the_last_word_is_padded():
    x = torch.zeros(1, 640)
    # Largest magnitudes of the five groups, and the powers of two at or above a 448th of them.
    for group, (amax, exponent) in enumerate([(3.0, -7), (448.0, 0), (449.0, 1), (1.75, -8), (0.0, -22)]):
        x[0, 128 * group] = -amax
        assert 2.0**exponent >= max(amax, 1e-4) / 448 > 2.0 ** (exponent - 1)
    q, words = quantise(x, round_scale=True, use_ue8m0=True)
    assert (words.dtype, words.shape) == (torch.int32, (1, 2))
    wanted = [127 - 7 | 127 << 8 | 128 << 16 | 119 << 24, 105]
    assert words.tolist() == [wanted]
    plain, scales = quantise(x, round_scale=True)
    assert torch.equal(q.view(torch.uint8), plain.view(torch.uint8))
    assert scales.tolist() == [[2.0**-7, 1.0, 2.0, 2.0**-8, 2.0**-22]]
    # Words of several rows, innermost in memory, as a dispatch gives them.
    strided = words.repeat(3, 1).t().contiguous().t()
    assert torch.equal(dequantise(q.repeat(3, 1), strided), dequantise(q, scales).repeat(3, 1))
    one = quantise(x[:, :128], round_scale=True, use_ue8m0=True)
    assert dequantise(one[0].repeat(2, 1), one[1].repeat(2, 2)[:, ::2]).tolist() == [x[0, :128].tolist()] * 2


def test_not_a_number_spreads_over_its_group_and_no_farther():
    x = torch.ones(1, 256, dtype=torch.bfloat16)
    x[0, 7] = math.nan
    there = dequantise(*quantise(x)).isnan()
    assert there[0, :128].all()
    assert not there[0, 128:].any()
