"""Dimensions and lengths, with the texts that users know."""

import pytest
import torch

from tcomm.errors import ConfigError, UsageError
from tcomm.groups.device.sizes import dim_of, sizes_of


def test_a_dimension_is_counted_from_the_front():
    x = torch.ones(2, 3, 4)
    assert [dim_of("all_gather", x, dim) for dim in (-3, -1, 0, 2)] == [0, 2, 0, 2]
    for bad in (3, -4):
        with pytest.raises(
            UsageError, match=rf"Invalid dim \({bad}\) for input tensor with shape torch.Size"
        ):
            dim_of("all_gather", x, bad)
    with pytest.raises(ConfigError, match=r"takes a torch\.Tensor, not int"):
        dim_of("all_gather", 3, 0)


def test_sizes_are_one_for_each_rank():
    assert sizes_of("all_gatherv", None, 2) is None
    assert sizes_of("all_gatherv", [3, 0], 2) == (3, 0)
    for bad in ([1], [1, -1], [1, 0.5]):
        with pytest.raises(AssertionError, match="sizes of all_gatherv"):
            sizes_of("all_gatherv", bad, 2)
