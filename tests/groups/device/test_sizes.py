"""Dimensions and lengths, with the texts that users know."""

import pytest
import torch

from tcomm.errors import ConfigError, UsageError
from tcomm.groups.device.sizes import check_gatherv, dim_of, rank_of, scatter_of, shape_of, sizes_of


def test_a_dimension_is_counted_from_the_front():
    x = torch.ones(2, 3, 4)
    assert [dim_of("all_gather", x, dim) for dim in (-3, -1, 0, 2)] == [0, 2, 0, 2]
    for bad in (3, -4, True):
        with pytest.raises(
            UsageError, match=rf"Invalid dim \({bad}\) for input tensor with shape torch.Size"
        ):
            dim_of("all_gather", x, bad)
    with pytest.raises(ConfigError, match=r"takes a torch\.Tensor, not int"):
        dim_of("all_gather", 3, 0)


def test_sizes_are_one_for_each_rank():
    assert sizes_of("all_gatherv", None, 2) is None
    assert sizes_of("all_gatherv", [3, 0], 2) == (3, 0)
    for bad in ([1], [1, -1], [1, 0.5], [True, True], 3):
        with pytest.raises(AssertionError, match="sizes of all_gatherv"):
            sizes_of("all_gatherv", bad, 2)


def test_a_rank_is_one_of_the_group():
    assert rank_of("send", "dst", 1, 2, "tp:0") == 1
    for bad in (2, -1, True, None, "x"):
        with pytest.raises(
            UsageError, match=rf"Invalid dst rank \({bad}\) of send: group 'tp:0' has ranks 0"
        ):
            rank_of("send", "dst", bad, 2, "tp:0")


def test_a_shape_is_that_of_a_tensor():
    assert shape_of("recv", [2, 3], torch.int8) == torch.Size([2, 3])
    assert shape_of("recv", (), torch.int8) == torch.Size([])
    for bad in (None, 3, (1.5,), (-1,), "x"):
        with pytest.raises(ConfigError, match="of recv is no shape"):
            shape_of("recv", bad, torch.int8)
    with pytest.raises(ConfigError, match=r"dtype=None of recv is no torch\.dtype"):
        shape_of("recv", (1,), None)


def test_what_is_gathered_has_the_lengths_that_sizes_say():
    x, y = torch.ones(2, 3), torch.ones(4, 3)
    assert check_gatherv(x, -1, None, 0, 2) == ([1], None)
    assert check_gatherv([x, y], 1, [3, 1], 0, 2) == ([1, 1], (3, 1))
    with pytest.raises(UsageError, match=r"\[4, 3\] != 2: rank 1 gives all_gatherv another number of rows"):
        check_gatherv((x, y), 0, [1, 2], 1, 2)
    for bad in (None, "x", 3):
        with pytest.raises(ConfigError, match=r"takes a torch\.Tensor or a list"):
            check_gatherv(bad, 0, None, 0, 1)


def test_what_is_given_out_is_what_the_ranks_get_together():
    x = torch.ones(4, 3)
    assert scatter_of("reduce_scatter", x, -2, None, 2) == (0, None)
    assert scatter_of("reduce_scatterv", x, 1, [1, 2], 2) == (1, (1, 2))
    with pytest.raises(UsageError, match="3 rows along dim 1 do not divide among 2 ranks"):
        scatter_of("reduce_scatter", x, 1, None, 2)
    with pytest.raises(UsageError, match="4 != 99: reduce_scatterv along dim 0"):
        scatter_of("reduce_scatterv", x, 0, [99], 1)
