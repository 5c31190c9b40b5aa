import numpy as np
import pytest

from tests.groups.queue.peers import from_rank_0


def _pass_large(member, nbytes):
    queue = from_rank_0(member, chunk_bytes=4 << 20, chunks=4)
    marks = np.arange(nbytes // 8 >> 9)
    if member.rank == 0:
        value = np.zeros(nbytes // 8, np.int64)
        value[:: 1 << 9] = marks
        for message in ("before", value, "after"):
            queue.enqueue(message, 60)
        member.meet("done")
        return None
    assert queue.dequeue(60) == "before"
    got = queue.dequeue(60)
    assert queue.dequeue(60) == "after"
    member.meet("done")
    is_equal = got.nbytes == nbytes and np.array_equal(got[:: 1 << 9], marks)
    return is_equal and not got[1 :: 1 << 9].any(), got.flags.writeable


@pytest.mark.parametrize("nbytes", [pytest.param(1 << 30, marks=pytest.mark.stress), 100 << 20])
def test_f24_a_large_message_passes_a_ring_of_sixteen_mebibytes_in_order(world, nbytes):
    assert world(2, _pass_large, nbytes, timeout=100)[1] == (True, True)
