import pytest
import torch

from tcomm.errors import ConfigError, UsageError
from tcomm.groups.helpers.tensors import is_weak_contiguous, split_tensor_along_last_dim


def test_parts_are_views_unless_copies_are_asked_for():
    x = torch.arange(24).reshape(2, 3, 4)
    views = split_tensor_along_last_dim(x, 2)
    assert isinstance(views, tuple)
    assert [part.tolist() for part in views] == [x[..., :2].tolist(), x[..., 2:].tolist()]
    assert [part.data_ptr() - x.data_ptr() for part in views] == [0, 2 * x.itemsize]
    copies = split_tensor_along_last_dim(x, 2, contiguous_split_chunks=True)
    assert all(part.is_contiguous() for part in copies)
    assert [part.tolist() for part in copies] == [part.tolist() for part in views]
    assert copies[1].untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_an_empty_dimension_has_as_many_parts():
    assert [list(part.shape) for part in split_tensor_along_last_dim(torch.empty(2, 0), 3)] == [[2, 0]] * 3


def test_what_does_not_divide_is_refused():
    with pytest.raises(UsageError, match=r"^5 is not divisible by 2$"):
        split_tensor_along_last_dim(torch.empty(5), 2)
    with pytest.raises(ZeroDivisionError):
        split_tensor_along_last_dim(torch.empty(5), 0)
    for x, parts in ((torch.tensor(1.0), 1), (torch.empty(4), -2)):
        with pytest.raises(ConfigError, match="give one with a dimension, and a positive number"):
            split_tensor_along_last_dim(x, parts)


@pytest.mark.parametrize(
    ("x", "wanted"),
    [
        (torch.empty(3, 4), True),
        (torch.empty(3, 4).t(), True),
        (torch.empty(2, 3, 4).permute(2, 0, 1), True),
        (torch.empty(6, 4)[2:].t(), True),
        (torch.empty(6, 4)[:2].t(), False),
        (torch.empty(6, 4)[:, ::2], False),
        (torch.empty(1).expand(4), False),
    ],
)
def test_a_tensor_is_all_of_its_memory_in_some_order(x, wanted):
    assert is_weak_contiguous(x) is wanted
