import numpy as np
import torch

from tests.groups.queue.peers import pair


def test_f23_received_values_stay_when_the_ring_wraps(memory_directory, monkeypatch):
    monkeypatch.setenv("TCOMM_SHM_DIR", memory_directory)
    with pair(chunk_bytes=3 << 20, chunks=2) as (writer, reader):
        kept = []
        for number in range(12):
            given = {"a": np.full(1 << 17, number), "t": torch.full((1000,), number), "b": bytes([number]) * 9999}
            writer.enqueue(given)
            given["a"][:] = -1
            kept.append(reader.dequeue(5))
        for number, value in enumerate(kept):
            assert (value["a"] == number).all()
            assert (value["t"] == number).all()
            assert value["b"] == bytes([number]) * 9999
            value["a"][:] = 0
