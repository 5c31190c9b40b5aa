"""A handler of a signal, for a while."""

import contextlib
import signal


@contextlib.contextmanager
def handling(number, handler):
    """`handler` runs when the signal comes, until the block ends."""
    previous = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, previous)
