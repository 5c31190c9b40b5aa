"""Triton's interpreter without the half of its time in which it prepares what is prepared.

It makes `triton.language` interpretable for a launch, and again for every call of a jit function within the
launch, where it looks through all names of the language and finds them done. For every value it works out
anew what a shape is as a constant, and makes a table of dtypes to look one up. What a kernel does is the same
with and without this; the tests that start programs of their own run without.
"""

import functools
import inspect
import math

import triton.language as tl
from triton.runtime import interpreter


def use_quick_interpreter() -> None:
    """In this process and in those that are forked from it."""
    call = interpreter.InterpretedFunction.__call__
    if hasattr(call, "__wrapped__"):
        return

    @functools.wraps(call)
    def call_quickly(self, *args, **kwargs):
        if not all(map(_is_prepared, _languages(self.fn))):
            return call(self, *args, **kwargs)
        fn = self.rewrite()
        try:
            return fn(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call_quickly
    interpreter._get_np_dtype = _quick_np_dtype(interpreter._get_np_dtype)
    tl.core.tensor.__init__ = _make_tensor


def _quick_np_dtype(np_dtype):
    known = functools.cache(np_dtype)

    def quick_np_dtype(dtype):
        return known(tl.core.uint64 if dtype.scalar.is_ptr() else dtype.scalar)

    return quick_np_dtype


def _make_tensor(self, handle, kind):
    self.handle = handle
    self.type = kind
    self.dtype = kind.scalar
    self.numel, self.shape = _numel_and_shape(*kind.shape) if kind.is_block() else _numel_and_shape()


@functools.cache
def _numel_and_shape(*lengths):
    return tl.constexpr(math.prod(lengths)), tl.core.tuple([tl.constexpr(length) for length in lengths])


@functools.cache
def _languages(fn):
    """The modules of the language that a function sees."""
    return [
        value for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)
    ] or [tl]


def _is_prepared(language) -> bool:
    return not (tl.core.is_builtin(language.load) or tl.core.is_builtin(language.tensor.to))
