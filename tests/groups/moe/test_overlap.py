import torch

from tcomm.groups.moe.overlap import EventOverlap


class Event:
    recorded = 0

    def record(self):
        self.recorded += 1


class Stream:
    def __init__(self):
        self.awaited = []

    def wait_event(self, event):
        self.awaited.append(event)


def test_on_a_cpu_there_is_nothing_to_wait_for():
    overlap = EventOverlap.now()
    assert (overlap.event, overlap.extra_tensors) == (None, None)
    assert overlap.current_stream_wait() is None
    with overlap as entered:
        assert entered is overlap


def test_a_stream_waits_for_the_event(monkeypatch):
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    overlap = EventOverlap.now()
    assert overlap.event.recorded == 1
    with overlap:
        assert stream.awaited == []
    overlap.current_stream_wait()
    assert stream.awaited == [overlap.event] * 2
    kept = (torch.ones(1),)
    assert EventOverlap(None, kept).extra_tensors is kept
