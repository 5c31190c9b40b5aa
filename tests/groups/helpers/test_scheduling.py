import os
import time

import pytest

from tcomm.groups.helpers import scheduling


@pytest.mark.parametrize("flag", [True, False])
def test_the_processor_is_given_up_as_the_flag_says(monkeypatch, flag):
    calls = []
    monkeypatch.setattr(scheduling, "USE_SCHED_YIELD", flag)
    monkeypatch.setattr(os, "sched_yield", lambda: calls.append("yield"))
    monkeypatch.setattr(time, "sleep", calls.append)
    scheduling.sched_yield()
    assert calls == ["yield" if flag else 0]


def test_this_python_has_a_yield_that_lets_go():
    assert scheduling.USE_SCHED_YIELD is True
