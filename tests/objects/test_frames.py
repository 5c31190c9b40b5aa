import contextlib
import hashlib
import select
import signal
import socket
import struct
import time

import pytest

from tcomm.errors import DecodeError, PeerLostError, PeerTimeoutError
from tcomm.objects.frames import FrameKey, recv_frame, send_frame, wait_until_ready
from tests.objects.handling import handling
from tests.objects.pairs import Aside, pair, soon

KEY = bytes(range(32))


@pytest.fixture
def sockets():
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        right.setblocking(False)
        yield left, right


def _frame(payload, count=0, key=KEY):
    """A frame as `docs/objects.md` describes it."""
    length = struct.pack("<Q", len(payload))
    covered = length + struct.pack("<Q", count) + payload
    return (
        length + hashlib.blake2b(covered, digest_size=32, key=key, person=b"tcomm frame").digest() + payload
    )


def test_a_frame_is_as_documented(sockets):
    left, right = sockets
    key = FrameKey(KEY)
    send_frame(left, [b"ab", bytearray(b"c"), b"", memoryview(b"d")], key, soon())
    send_frame(left, [], key, soon())
    right.setblocking(True)
    assert right.recv(1000) == _frame(b"abcd") + _frame(b"", 1)
    assert FrameKey(KEY).tag(struct.pack("<Q", 4), [b"abcd"]) == _frame(b"abcd")[8:40]


def test_frames_arrive_whole_and_in_order_however_they_are_cut(sockets):
    left, right = sockets
    large = bytes(range(256)) * 20_000
    frames = [b"", b"x", large, b"y" * 100]
    sending = Aside(lambda key: [send_frame(left, _cut(f), key, soon()) for f in frames], FrameKey(KEY))
    key = FrameKey(KEY)
    assert [recv_frame(right, key, len(large), soon()) for _ in frames] == frames
    sending.result()
    slow = _frame(b"slow", len(frames))

    def drip():
        for byte in slow:
            left.send(bytes([byte]))
            time.sleep(0.001)

    dripping = Aside(drip)
    assert recv_frame(right, key, 4, soon()) == b"slow"
    dripping.result()


def _cut(frame, pieces=3000):
    step = len(frame) // pieces + 1
    return [frame[i : i + step] for i in range(0, len(frame), step)]


OTHER_KEY = bytes(32)
WRONG = {
    "another key": [_frame(b"ab", key=OTHER_KEY)],
    "an altered payload": [_frame(b"ab")[:-1] + b"c"],
    "an altered tag": [_frame(b"ab")[:8] + bytes(32) + b"ab"],
    "sent again": [_frame(b"ab"), _frame(b"ab")],
    "one left out": [_frame(b"ab", 1)],
    "a shorter length": [struct.pack("<Q", 1) + _frame(b"ab")[8:]],
}


@pytest.mark.parametrize("sent", WRONG.values(), ids=WRONG.keys())
def test_what_the_peer_did_not_send_next_is_refused_and_ends_the_connection(sockets, sent):
    left, right = sockets
    left.sendall(b"".join(sent) + _frame(b"ab"))
    key = FrameKey(KEY)
    for _ in sent[1:]:
        assert recv_frame(right, key, 10, soon()) == b"ab"
    with pytest.raises(DecodeError, match="a frame is not what the peer sent next"):
        recv_frame(right, key, 10, soon())
    with pytest.raises(PeerLostError, match="broke off; open another connection"):
        recv_frame(right, key, 10, soon())


def test_the_tag_is_compared_in_constant_time(sockets, monkeypatch):
    left, right = sockets
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append((bytes(a), b)) or True)
    left.sendall(_frame(b"ab")[:8] + bytes(32) + b"ab")
    assert recv_frame(right, FrameKey(KEY), 10, soon()) == b"ab"
    assert compared == [(bytes(32), _frame(b"ab")[8:40])]


@pytest.mark.parametrize("nbytes", [11, 2**40, 2**64 - 1])
def test_a_length_is_checked_before_there_is_memory_for_it(sockets, nbytes):
    left, right = sockets
    left.sendall(struct.pack("<Q", nbytes) + bytes(32))
    with pytest.raises(DecodeError, match=f"a frame of {nbytes} bytes is larger than max_nbytes=10"):
        recv_frame(right, FrameKey(KEY), 10, soon())


def test_a_deadline_passes_without_harm_unless_a_frame_has_begun(sockets):
    left, right = sockets
    key = FrameKey(KEY)
    started = time.monotonic()
    with pytest.raises(PeerTimeoutError, match="did not send the next bytes before the deadline"):
        recv_frame(right, key, 10, soon(0.1))
    assert 0.09 < time.monotonic() - started < 5
    left.sendall(_frame(b"ab") + _frame(b"cd", 1)[:-1])
    assert recv_frame(right, key, 10, soon(-1)) == b"ab"
    for error in (PeerTimeoutError, PeerLostError):
        with pytest.raises(error):
            recv_frame(right, key, 10, soon(0.05))
    sending = FrameKey(KEY)
    with pytest.raises(PeerTimeoutError, match="did not take the next bytes"):
        send_frame(left, [bytes(1 << 24)], sending, soon(0.05))
    with pytest.raises(PeerLostError, match="broke off"):
        send_frame(left, [b"x"], sending, soon(0.05))


def test_a_frame_of_which_nothing_went_out_can_be_sent_again(sockets):
    left, right = sockets
    with contextlib.suppress(BlockingIOError):
        while True:
            left.send(bytes(1 << 16))
    key = FrameKey(KEY)
    with pytest.raises(PeerTimeoutError):
        send_frame(left, [b"ab"], key, soon(0.01))
    while select.select([right], [], [], 0)[0]:
        right.recv(1 << 20)
    send_frame(left, [b"ab"], key, soon())
    assert recv_frame(right, FrameKey(KEY), 10, None) == b"ab"


@pytest.mark.parametrize("given", [b"", _frame(b"abc")[:20], _frame(b"abc")[:41]])
def test_a_peer_that_is_gone_is_lost(sockets, given):
    left, right = sockets
    left.sendall(given)
    left.close()
    with pytest.raises(PeerLostError, match="the peer closed the connection"):
        recv_frame(right, FrameKey(KEY), 10, None)
    with pytest.raises(PeerLostError, match="the connection to the peer is gone"):
        send_frame(right, [b"x"], FrameKey(KEY), soon())


def _time_out(*_):
    raise TimeoutError("of the caller")


class _Interrupted:
    """A socket on which every call is interrupted by a signal."""

    def _interrupt(self, _):
        signal.raise_signal(signal.SIGALRM)

    sendmsg = recv_into = _interrupt


def test_what_a_signals_handler_raises_is_not_taken_for_a_lost_peer():
    with handling(signal.SIGALRM, _time_out):
        with pytest.raises(TimeoutError, match="of the caller"):
            send_frame(_Interrupted(), [b"x"], FrameKey(KEY), soon())
        with pytest.raises(TimeoutError, match="of the caller"):
            recv_frame(_Interrupted(), FrameKey(KEY), 10, soon())


def test_a_key_knows_whether_it_is_inside_a_frame():
    key, other = FrameKey(KEY), FrameKey(KEY)
    key.begin()
    key.moved()
    with pytest.raises(PeerLostError):
        key.begin()
    key.end()
    key.begin()
    assert key.tag(b"", []) != other.tag(b"", [])
    other.end()
    assert key.tag(b"", []) == other.tag(b"", [])


def test_wait_until_ready_sleeps_until_then(sockets):
    left, right = sockets
    wait_until_ready(left, select.POLLOUT, soon(-1))
    started, cpu = time.monotonic(), time.process_time()
    with pytest.raises(PeerTimeoutError):
        wait_until_ready(right, select.POLLIN, soon(0.2))
    assert time.monotonic() - started > 0.19
    assert time.process_time() - cpu < 0.1
    left.send(b"x")
    wait_until_ready(right, select.POLLIN, None)


def test_a_connection_sends_both_ways_with_keys_of_their_own():
    with pair() as (a, b), a as entered:
        assert entered is a
        a.send([b"to ", b"b"], soon())
        b.send([b"to a"], soon())
        assert select.select([a.fileno(), b.fileno()], [], [], 5)[0] == [a.fileno(), b.fileno()]
        assert b.receive(100, soon()) == b"to b"
        assert a.receive(100, soon()) == b"to a"
        sock = socket.socket(fileno=socket.dup(a.fileno()))
        with sock:
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert b.peer == "{}:{}".format(*sock.getsockname())
        a.send([b"four"], soon())
        with pytest.raises(DecodeError, match="larger than max_nbytes=3"):
            b.receive(3, soon())
        b.close()
        with pytest.raises(PeerLostError):
            a.receive(100, soon())


def test_a_frame_of_one_direction_or_connection_is_refused_in_another(monkeypatch):
    with pair() as (a, b), pair() as (c, d):
        a.send([b"x"], soon())
        recorded = socket.socket(fileno=socket.dup(b.fileno()))
        with recorded:
            recorded.setblocking(True)
            frame = recorded.recv(1000)
        for victim, sender in ((a, b), (d, c)):
            replay = socket.socket(fileno=socket.dup(sender.fileno()))
            with replay:
                replay.sendall(frame)
            with pytest.raises(DecodeError, match="sent again, or of somebody else"):
                victim.receive(100, soon())
