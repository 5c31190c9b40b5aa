import functools
import signal

import numpy as np
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


def _fail_once(number, frame):
    signal.signal(number, signal.SIG_IGN)
    _fail()


HANDLERS = {
    "function": _fail_deeper,
    "one shot": _fail_once,
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
        # Other arguments are looked at for nothing but what they are.
        assert not is_from_handler(_caught(lambda: _fail((np.ones(2), 1), np.ones(2))))
        assert not is_from_handler(_caught(lambda: exec("raise TimeoutError")))
        assert not is_from_handler(_caught(lambda: handler(signal.SIGUSR1, None)))
