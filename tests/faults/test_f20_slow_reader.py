import os

import numpy as np
import pytest

from tcomm.errors import QueueFullError
from tests.groups.queue.peers import pair


def test_f20_a_slow_reader_is_named_nothing_is_lost_and_the_queue_goes_on(memory_directory, monkeypatch):
    monkeypatch.setenv("TCOMM_SHM_DIR", memory_directory)
    with pair(2, chunk_bytes=64, chunks=4) as (writer, fast, slow):
        for number in range(4):
            writer.enqueue(number)
            assert fast.dequeue(5) == number
        assert slow.dequeue(5) == 0
        writer.enqueue(4)
        with pytest.raises(QueueFullError) as caught:
            writer.enqueue(5, timeout=0.2)
        told = str(caught.value)
        assert f"the reader of rank 1 (pid {os.getpid()}, running) last waited for a chunk 0." in told
        assert "it is 4 chunks behind and holds slot 1 of 4" in told
        assert (caught.value.peers, caught.value.op) == ((1,), "enqueue")
        # Part of this one goes out before its time is up; readers never see it.
        assert [slow.dequeue(5) for _ in range(2)] == [1, 2]
        with pytest.raises(QueueFullError):
            writer.enqueue(np.arange(500), timeout=0.2)
        assert [slow.dequeue(5) for _ in range(2)] == [3, 4]
        assert fast.dequeue(5) == 4
        with pytest.raises(TimeoutError):
            slow.dequeue(0.05)
        with pytest.raises(TimeoutError):
            fast.dequeue(0.05)
        # Of several chunks, like the one that was given up.
        writer.enqueue(b"resumed" * 20)
        assert [fast.dequeue(5), slow.dequeue(5)] == [b"resumed" * 20] * 2
