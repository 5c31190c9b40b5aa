import pytest

from tcomm.memory import pause


def test_pauses_are_a_quarter_of_what_was_waited_within_limits(monkeypatch):
    clock = [5.0]
    monkeypatch.setattr(pause.time, "monotonic", lambda: clock[0])
    slept = []
    monkeypatch.setattr(pause.time, "sleep", slept.append)
    sleep = pause.Pause()
    for waited in (0.0, 0.0004, 0.004, 0.04, 4.0):
        clock[0] = 5.0 + waited
        sleep()
    assert slept == pytest.approx([0.0002, 0.0002, 0.001, 0.01, 0.02])
