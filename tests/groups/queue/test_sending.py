import numpy as np
import pytest

from tcomm.errors import PeerLostError, PeerTimeoutError, UsageError
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


def test_a_slot_is_not_lent_where_a_reader_is_gone_though_there_is_room():
    with pair(2) as (writer, first, second):
        ring = writer._sender.sides[0]
        first.shutdown()
        ring._looked = 0.0
        with (
            pytest.raises(PeerLostError, match="the reader of rank 0 has left") as raised,
            writer.acquire_write(5),
        ):
            pass
        assert raised.value.peers == (0,)
        with pytest.raises(PeerTimeoutError, match="wrote nothing"):
            second.dequeue(0.05)
