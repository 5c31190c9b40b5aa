import contextlib

import pytest

import tcomm.objects.payload
from tcomm.errors import PeerTimeoutError
from tcomm.objects.payload import Payload
from tests.objects.coming import Coming

WHOLE = bytes(range(1, 251)) * 40


@pytest.mark.parametrize("piece", [1000, 4096, 10_000])
def test_a_payload_is_copied_as_it_comes_and_never_before(piece):
    for copy in ("to_bytes", "copy_into", "view"):
        coming = Coming(WHOLE, piece)
        payload = Payload(coming.data, 100, 9876, coming.arrived)
        assert len(payload) == 9776
        if copy == "copy_into":
            made = bytearray(9776)
            payload.copy_into(memoryview(made))
        else:
            made = getattr(payload, copy)()
        assert bytes(made) == WHOLE[100:9876]
        assert type(made) is {"to_bytes": bytes, "copy_into": bytearray, "view": memoryview}[copy]
        steps = len(coming.asked)
        # One step for all where a view is given out, else a few of each piece.
        assert steps == 1 if copy == "view" else -(-9876 // piece) <= steps <= -(-9876 // piece) + 3


def test_a_payload_that_is_there_is_not_waited_for():
    payload = Payload(memoryview(bytearray(WHOLE)), 3, 7)
    made = bytearray(4)
    payload.copy_into(memoryview(made))
    assert bytes(made) == payload.to_bytes() == bytes(payload.view()) == WHOLE[3:7]
    assert Payload(memoryview(b"abc"), 1, 1).to_bytes() == b""


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097])
def test_a_payload_of_any_length_is_whole_and_nothing_after_it_is_waited_for(nbytes):
    coming = Coming(WHOLE, 1)
    assert Payload(coming.data, 5, 5 + nbytes, coming.arrived).to_bytes() == WHOLE[5 : 5 + nbytes]
    assert max(coming.asked, default=0) <= 5 + nbytes


@pytest.mark.parametrize("copy", ["to_bytes", "view"])
def test_what_the_wait_raises_comes_out(copy):
    def arrived(nbytes):
        if nbytes > 5000:
            raise PeerTimeoutError("no more")
        return 5000

    with pytest.raises(PeerTimeoutError, match="no more"):
        getattr(Payload(memoryview(bytearray(WHOLE)), 0, 9000, arrived), copy)()


def test_bytes_that_were_interrupted_leave_nothing_to_the_next():
    def stop(nbytes):
        if nbytes > 9000:
            raise PeerTimeoutError("no more")
        return 9000

    other = memoryview(bytes(reversed(WHOLE)))
    with pytest.raises(PeerTimeoutError, match="no more"):
        Payload(other, 0, 9500, stop).to_bytes()
    assert Payload(memoryview(WHOLE), 1, 9876, lambda _: len(WHOLE)).to_bytes() == WHOLE[1:9876]


def test_who_waits_for_one_payload_may_read_another():
    other = bytes(reversed(WHOLE))
    inner = []

    def arrived(nbytes):
        inner.append(Payload(memoryview(other), 2, 9000, lambda _: len(other)).to_bytes())
        return nbytes + 999

    assert Payload(memoryview(WHOLE), 1, 8000, arrived).to_bytes() == WHOLE[1:8000]
    assert set(inner) == {other[2:9000]}


def test_a_message_is_let_go_once_its_bytes_are_made():
    message = bytearray(WHOLE)
    made = Payload(memoryview(message), 0, len(WHOLE), lambda _: len(WHOLE)).to_bytes()
    # Refused while somebody still views it.
    message.clear()
    assert made == WHOLE


def test_a_message_is_let_go_where_its_wait_raised():
    message = bytearray(WHOLE)

    def lose(_):
        raise PeerTimeoutError("no more")

    def read():
        with contextlib.suppress(PeerTimeoutError):
            Payload(memoryview(message), 0, len(WHOLE), lose).to_bytes()

    read()
    message.clear()


def test_what_reads_bytes_is_made_once(monkeypatch):
    def read():
        return Payload(memoryview(WHOLE), 5, 9000, lambda _: len(WHOLE)).to_bytes()

    read()
    monkeypatch.setattr(tcomm.objects.payload, "_BytesReader", None)
    assert [read() for _ in range(3)] == [WHOLE[5:9000]] * 3
