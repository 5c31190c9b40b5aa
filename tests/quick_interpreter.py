"""Triton's interpreter without the half of its time in which it prepares what is prepared.

It makes `triton.language` interpretable for a launch, and again for every call of a jit function within the
launch, where it looks through all names of the language and finds them done. What a kernel does is the same
with and without this; the tests that start programs of their own run without.
"""

import functools
import inspect

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


@functools.cache
def _languages(fn):
    """The modules of the language that a function sees."""
    return [
        value for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)
    ] or [tl]


def _is_prepared(language) -> bool:
    return not (tl.core.is_builtin(language.load) or tl.core.is_builtin(language.tensor.to))
