"""Connections whose other side is a thread of the test."""

import contextlib
import threading
import time

from tcomm.objects.listener import FrameListener, connect_frames

SECONDS = 10.0


def soon(seconds=SECONDS):
    return time.monotonic() + seconds


class Aside:
    """A call in a thread of its own."""

    def __init__(self, call, *args):
        self._outcome = None
        self._thread = threading.Thread(target=self._run, args=(call, args))
        self._thread.start()

    def _run(self, call, args):
        try:
            self._outcome = (call(*args), None)
        except Exception as error:
            self._outcome = (None, error)

    def result(self):
        self._thread.join(SECONDS * 3)
        assert self._outcome is not None, "the call does not end"
        value, error = self._outcome
        if error is not None:
            raise error
        return value


def connect_to(listener, seconds=SECONDS):
    """The two sides of a new connection: the one that listens, and the one that connects."""
    connecting = Aside(connect_frames, *listener.address, soon(seconds))
    accepted = listener.accept(soon(seconds))
    return accepted, connecting.result()


@contextlib.contextmanager
def pair(host="127.0.0.1"):
    """Two connected sides."""
    with FrameListener(host) as listener:
        a, b = connect_to(listener)
    with a, b:
        yield a, b
