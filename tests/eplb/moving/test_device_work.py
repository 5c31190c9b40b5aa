import torch

from tcomm.eplb.moving.device_work import DeviceWork


class Stream:
    def __init__(self, told):
        self._told = told

    def synchronize(self):
        self._told.append("stream synchronized")


class Event(Stream):
    def record(self, stream):
        self._told.append(("recorded", type(stream).__name__))

    def synchronize(self):
        self._told.append("event synchronized")


def test_a_gpu_is_waited_for_where_peers_depend_on_it(monkeypatch):
    told = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: told.append(str(device)) or Stream(told))
    monkeypatch.setattr(torch.cuda, "Event", lambda: told.append("made") or Event(told))
    work = DeviceWork(torch.device("cuda", 3))
    work.wait_for_weights()
    assert told == []
    work.wait_for_rows()
    assert told == ["cuda:3", "stream synchronized"]
    told.clear()
    work.note_weights()
    work.note_weights()
    assert told == ["made", "cuda:3", ("recorded", "Stream"), "cuda:3", ("recorded", "Stream")]
    told.clear()
    work.wait_for_weights()
    assert told == ["event synchronized"]


def test_a_host_is_done_when_it_returns(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", None)
    work = DeviceWork(torch.device("cpu"))
    work.note_weights()
    work.wait_for_rows()
    work.wait_for_weights()
