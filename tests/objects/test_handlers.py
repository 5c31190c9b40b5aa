import functools
import signal

import pytest

from tcomm.objects.handlers import is_from_handler
from tests.objects.handling import handling


def _fail(*_):
    raise TimeoutError("too late")


def _fail_deeper(number, frame):
    _fail(number, frame)


class _Handler:
    def __call__(self, number, frame):
        _fail(number, frame)

    def method(self, number, frame):
        _fail(number, frame)


HANDLERS = {
    "function": _fail_deeper,
    "method": _Handler().method,
    "object": _Handler(),
    "partial": functools.partial(functools.partial(_fail, 1), 2),
}


def _caught(call):
    try:
        call()
    except TimeoutError as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("handler", HANDLERS.values(), ids=HANDLERS)
def test_what_a_handler_raises_is_told_from_what_the_same_call_raises_otherwise(handler):
    with handling(signal.SIGUSR1, handler):
        assert is_from_handler(_caught(lambda: signal.raise_signal(signal.SIGUSR1)))
        assert not is_from_handler(_caught(lambda: exec("raise TimeoutError")))
    error = _caught(lambda: handler(1, None))
    assert not is_from_handler(error)


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler, print])
def test_a_handler_that_is_no_python_is_nobodys(handler):
    with handling(signal.SIGUSR1, handler):
        assert not is_from_handler(_caught(_fail))
