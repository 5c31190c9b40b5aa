import time

import pytest

from tcomm.groups.queue.patience import default_seconds, spin_until


@pytest.mark.parametrize("spins", [0, 5])
def test_polling_ends_with_what_it_waits_for_or_after_a_millisecond(spins):
    looks = iter([False, False, True])
    assert spin_until(lambda: next(looks), spins) is True
    began = time.monotonic()
    assert spin_until(lambda: False, spins) is False
    assert 0.001 <= time.monotonic() - began < 1.0


def test_a_call_without_a_timeout_has_that_of_the_environment(monkeypatch):
    monkeypatch.setenv("TCOMM_TIMEOUT", "7.5")
    assert default_seconds() == 7.5
