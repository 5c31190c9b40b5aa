import numpy as np
import pytest

from tcomm.errors import UsageError
from tests.groups.queue.peers import pair

WRITTEN = "is being written; end the block of acquire_write first"


@pytest.mark.parametrize("value", ["short", np.arange(3), np.arange(100)], ids=["flat", "whole", "long"])
def test_nothing_else_is_written_while_a_slot_is_lent(value):
    with pair(chunk_bytes=256) as (writer, reader):
        with writer.acquire_write(5) as slot:
            slot[:3] = b"abc"
            with pytest.raises(UsageError, match=WRITTEN):
                writer.enqueue(value)
            with pytest.raises(UsageError, match=WRITTEN), writer.acquire_write(5):
                pass
        with reader.acquire_read(5) as slot:
            assert bytes(slot[:3]) == b"abc"
        with pytest.raises(ZeroDivisionError), writer.acquire_write(5):
            1 / 0  # noqa: B018
        writer.enqueue("after")
        assert reader.dequeue(5) == "after"
