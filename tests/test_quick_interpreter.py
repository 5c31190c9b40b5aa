import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from tests import quick_interpreter


@triton.jit
def _twice(x):
    return x + x


@triton.jit
def _kernel(x_ptr, out_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    x = tl.load(x_ptr + offsets)
    # One function of ours, and one of Triton's own library.
    tl.store(out_ptr + offsets, _twice(x) + tl.sum(tl.zeros_like(x) + 1))


def _run():
    out = torch.empty(8)
    _kernel[(1,)](torch.arange(8.0), out, 8)
    return out.tolist()


def test_the_language_is_prepared_once_for_a_launch_and_restored_after_it(monkeypatch):
    prepared = []
    prepare = interpreter._patch_lang
    monkeypatch.setattr(interpreter, "_patch_lang", lambda fn: prepared.append(fn.__name__) or prepare(fn))
    expected = [2.0 * x + 8 for x in range(8)]
    assert _run() == expected
    prepared.clear()
    assert _run() == expected
    assert prepared == ["_kernel"]
    assert tl.core.is_builtin(tl.load)
    assert not quick_interpreter._is_prepared(tl)


@triton.jit
def _fail(x):
    raise ValueError("not that")


@triton.jit
def _failing_kernel(x_ptr):
    _fail(tl.load(x_ptr))


def test_what_a_function_raises_is_an_error_of_the_interpreter_twice_as_ever():
    with pytest.raises(interpreter.InterpreterError, match=r"InterpreterError\(.*ValueError.*not that"):
        _failing_kernel[(1,)](torch.ones(1))
