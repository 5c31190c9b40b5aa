import numpy as np
import pytest

from tcomm.errors import DecodeError
from tests.groups.queue.peers import pair


@pytest.mark.parametrize("garbage", [b"\xc1" * 40, b"\x80\x04\x95cos\nsystem\n", b"\x93\x01", b""])
def test_f18_a_message_that_is_none_costs_each_reader_one_error(memory_directory, monkeypatch, garbage):
    monkeypatch.setenv("TCOMM_SHM_DIR", memory_directory)
    with pair(2, chunk_bytes=64, chunks=2) as (writer, *readers):
        for round_ in range(3):
            with writer.acquire_write(5) as slot:
                slot[:] = garbage.ljust(64, b"\xc1")
            writer.enqueue(f"after {round_}", 5)
            for reader in readers:
                with pytest.raises(DecodeError) as caught:
                    reader.dequeue(5)
                assert (caught.value.op, caught.value.group) == ("dequeue", "queue")
                assert reader.dequeue(5) == f"after {round_}"


def test_f18_a_damaged_chunk_in_the_middle_of_a_message_costs_that_message(memory_directory, monkeypatch):
    monkeypatch.setenv("TCOMM_SHM_DIR", memory_directory)
    with pair(chunk_bytes=64, chunks=16) as (writer, reader):
        writer.enqueue(np.arange(50))
        ring = writer._sender.sides[0].ring
        ring.words[ring.slots_begin + 8 * 2 + 2] += 1
        writer.enqueue("after")
        with pytest.raises(DecodeError, match="a chunk of bytes"):
            reader.dequeue(5)
        assert reader.dequeue(5) == "after"
