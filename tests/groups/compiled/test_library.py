"""Defining an op of torch from a function and its type hints."""

import pytest
import torch
from torch.library import Library

from tcomm.groups.compiled.library import LIBRARY, check_before_autograd, direct_register_custom_op


def _twice(x: torch.Tensor, times: int = 2) -> torch.Tensor:
    return x * times


def _twice_fake(x: torch.Tensor, times: int = 2) -> torch.Tensor:
    return torch.empty_like(x)


def _fill(x: torch.Tensor, value: float) -> None:
    x.fill_(value)


def _no_hints(x):
    return x


def test_an_op_of_the_own_library():
    direct_register_custom_op("test_twice", _twice, fake_impl=_twice_fake)
    assert torch.ops.tcomm.test_twice(torch.ones(3)).tolist() == [2, 2, 2]
    assert (
        str(torch.ops.tcomm.test_twice.default._schema)
        == "tcomm::test_twice(Tensor x, SymInt times=2) -> Tensor"
    )
    compiled = torch.compile(lambda x: torch.ops.tcomm.test_twice(x, 3) + 1, fullgraph=True, backend="eager")
    assert compiled(torch.ones(2)).tolist() == [4, 4]
    assert LIBRARY.ns == "tcomm"
    with pytest.raises(RuntimeError, match="multiple times"):
        direct_register_custom_op("test_twice", _twice)


def test_an_op_of_another_library_that_writes_to_its_argument():
    library = Library("tcomm_test_library", "FRAGMENT")
    tags = (torch.Tag.needs_exact_strides,)
    direct_register_custom_op("fill", _fill, ["x"], None, library, "CPU", tags)
    op = torch.ops.tcomm_test_library.fill.default
    x = torch.zeros(2)
    op(x, 3.0)
    assert x.tolist() == [3, 3]
    assert op._schema.is_mutable
    assert torch.Tag.needs_exact_strides in op.tags
    with pytest.raises(NotImplementedError, match="no fake impl"):
        op(torch.empty(2, device="meta"), 1.0)


def test_type_hints_are_needed():
    with pytest.raises(ValueError, match="must have a type annotation"):
        direct_register_custom_op("test_no_hints", _no_hints)


def test_a_check_comes_before_what_torch_func_does():
    direct_register_custom_op("tests_checked", _twice, fake_impl=_twice_fake)
    told = []

    def check(*args):
        told.append([arg if isinstance(arg, str) else arg.requires_grad for arg in args])

    check_before_autograd("tests_checked", check)
    op = torch.ops.tcomm.tests_checked
    assert op(torch.ones(2), 3).tolist() == [3.0, 3.0]
    torch.func.grad(lambda x: op(x=x, times=3).sum())(torch.ones(2))
    assert ["tests_checked", False] in told
    assert ["tests_checked", True] in told
