import pytest
import torch

from tcomm.kernels.moe_quantise import has_e4m3
from tests.kernels import fp8_rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("round_scale", [False, True])
def test_kernels_have_the_bits_of_the_host(dtype, round_scale):
    fp8_rows.check_quantise("cpu", dtype, round_scale)


def test_every_upper_half_of_a_number_is_rounded_as_by_torch():
    fp8_rows.check_encode("cpu")


def test_the_host_rounds_by_integers():
    assert not has_e4m3(torch.device("cpu"))
