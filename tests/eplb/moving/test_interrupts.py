import signal
import threading

import pytest

from tcomm.eplb.moving.interrupts import interrupts_later


def test_ctrl_c_comes_behind_the_block_and_once():
    written = []

    def write():
        with interrupts_later():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            written.append("all")

    with pytest.raises(KeyboardInterrupt):
        write()
    assert written == ["all"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with interrupts_later():
        pass
    with pytest.raises(ZeroDivisionError), interrupts_later():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_ignores_it_or_is_another_thread_is_left_alone():
    written = []

    def write():
        with interrupts_later():
            written.append(signal.getsignal(signal.SIGINT))

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        write()
    finally:
        signal.signal(signal.SIGINT, before)
    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert written == [signal.SIG_IGN, signal.default_int_handler]
