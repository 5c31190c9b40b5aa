from tcomm.groups.stateless import waits


def test_pauses_grow_up_to_a_limit(monkeypatch):
    slept = []
    monkeypatch.setattr(waits.time, "sleep", slept.append)
    pause = waits.Pause()
    for _ in range(20):
        pause()
    assert slept == sorted(slept)
    assert (slept[0], slept[-1]) == (0.0003, 0.02)
