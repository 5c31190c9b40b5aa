"""What is asked of CUDA, with a stand-in for torch's streams."""

import pytest
import torch

from tcomm.memory.runtime import CudaRuntime

DEFAULT = "default stream"


@pytest.fixture
def asked(monkeypatch):
    """Every record and wait, in order, by the stream that it was made on."""
    asked = []

    class Event:
        def record(self, stream):
            asked.append(("record", stream))

        def wait(self, stream):
            asked.append(("wait", stream))

    def external(handle, device):
        # torch's takes 0 for no handle, and gives any stream of its pool.
        return f"stream {handle}" if handle else "any stream"

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "ExternalStream", external)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: DEFAULT)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    return asked


@pytest.mark.parametrize(
    ("waiting", "awaited", "names"),
    [(7, 0, ("stream 7", DEFAULT)), (0, 7, (DEFAULT, "stream 7")), (7, 8, ("stream 7", "stream 8"))],
)
def test_the_default_stream_waits_and_is_awaited_like_any_other(asked, waiting, awaited, names):
    CudaRuntime(torch.device("cuda", 0)).let_wait(waiting, awaited)
    assert asked == [("record", names[1]), ("wait", names[0])]
