import pytest
import torch

from tcomm import VirtualRanks
from tcomm.interpret import is_interpreted

pytestmark = pytest.mark.gpu(1)


def test_kernels_are_compiled_and_run():
    assert not is_interpreted()
    ranks = VirtualRanks(2)
    assert ranks.device.type == "cuda"
    x = ranks.empty(4)
    x.copy_(torch.arange(8.0).view(2, 4))
    y = ranks.all_reduce(x)
    ranks.check()
    assert y.tolist() == [[4.0, 6.0, 8.0, 10.0]] * 2
