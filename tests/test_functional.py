"""`tcomm.functional` is the public name of what autograd knows."""

import torch

import tcomm.functional
from tcomm.groups.compiled import functional


def test_it_has_every_form():
    assert tcomm.functional.__all__ == functional.__all__
    for name in functional.__all__:
        assert getattr(tcomm.functional, name) is getattr(functional, name)


def test_one_form_has_a_gradient():
    x = torch.ones(3, requires_grad=True)
    with tcomm.Communicator() as alone:
        (tcomm.functional.all_reduce(x, alone) * 2).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]
