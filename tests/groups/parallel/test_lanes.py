import pytest
import torch

from tcomm.errors import DecodeError, PeerTimeoutError
from tcomm.groups.parallel import lanes
from tcomm.groups.parallel.lanes import Lanes, SentMessage, broadcast_message
from tcomm.objects.codec import encode
from tests.groups.parallel.engine import refusal


@pytest.mark.parametrize("nbytes", [0, 959, 960, 961, 5000])
def test_a_message_is_whole_whether_it_fits_the_head_or_not(nbytes):
    framed = lanes._framed(encode(b"x" * nbytes))
    parts = lanes._parts_of(framed)
    assert len(parts[0]) == lanes._HEAD
    assert sum(map(len, parts)) == len(framed)
    assert lanes._decode(framed) == b"x" * nbytes


def test_a_length_that_is_no_length_is_refused():
    head = torch.full((lanes._HEAD,), 255, dtype=torch.uint8)
    with pytest.raises(DecodeError, match="at most"):
        lanes._make_room(head)


def _both_ways(member):
    """Each sends a long message ahead and then receives one: no lane waits for the other."""
    with member.communicator() as comm:
        mine = Lanes(comm)
        peer = 1 - member.rank
        handle = mine.isend(encode({"x": torch.full((200_000,), member.rank)}), peer)
        got = mine.recv(peer)["x"]
        handle.wait()
        assert handle.is_completed()
        if member.rank == 0:
            mine.send(encode("short"), peer)
            broadcast_message(comm, encode([1, 2]), 0)
        else:
            assert mine.recv(peer) == "short"
            assert broadcast_message(comm, None, 0) == [1, 2]
        mine.close()
        assert refusal(mine.send, encode(1), peer)[0] == "GroupClosedError"
        return int(got[0]), int(got.sum())


def test_long_messages_pass_each_other(on_ranks):
    assert on_ranks(2, _both_ways) == [(1, 200_000), (0, 0)]


class _Part:
    """A part of a message under way; what its wait raises is given."""

    def __init__(self, error=None):
        self.error, self.waits = error, 0

    def is_completed(self):
        return self.waits > 0

    def wait(self):
        self.waits += 1
        if self.error is not None:
            raise self.error


def test_the_handle_of_a_message_waits_for_each_part_and_tells_what_became_of_it():
    head, rest = _Part(), _Part()
    handle = SentMessage([head, rest])
    head.wait()
    assert not handle.is_completed()
    assert handle.wait() is None
    assert (head.waits, rest.waits) == (2, 1)
    assert handle.is_completed()
    lost = PeerTimeoutError("rank 1 is silent", peers=(1,))
    with pytest.raises(PeerTimeoutError, match="rank 1 is silent"):
        SentMessage([_Part(), _Part(lost)]).wait()


def _nonsense(member):
    with member.communicator() as comm:
        mine = Lanes(comm)
        if member.rank == 0:
            framed = lanes._framed(encode("fine"))
            framed[lanes._PREFIX :] = 193  # a byte that msgpack never uses
            mine._up.send(framed, 1)
            mine.send(encode("after"), 1)
            comm.barrier()
            return None
        told = refusal(mine.recv, 0)[0], mine.recv(0)
        comm.barrier()
        return told


def test_nonsense_costs_one_error_and_nothing_after_it(on_ranks):
    assert on_ranks(2, _nonsense)[1] == ("DecodeError", "after")
