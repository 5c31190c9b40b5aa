import contextlib
import errno
import functools
import gc
import logging
import os
import resource
import signal
import socket
import time

import hypothesis
import hypothesis.strategies as st
import pytest

from tcomm.errors import ConfigError, PeerLostError, PeerTimeoutError, RendezvousError
from tcomm.objects import listener as module
from tcomm.objects.frames import recv_frame
from tcomm.objects.listener import FrameListener, connect_frames
from tests.objects.handling import handling
from tests.objects.pairs import Aside, connect_to, soon

HELLO = b"tcommF1\n" + bytes(32)


@pytest.fixture(autouse=True)
def _without_secret(monkeypatch):
    monkeypatch.delenv("TCOMM_SECRET", raising=False)
    monkeypatch.delenv("VLLM_SECRET", raising=False)


@pytest.fixture
def listening():
    with FrameListener("127.0.0.1") as listener:
        yield listener


def _knock(listener, given=b""):
    sock = socket.create_connection(listener.address, timeout=10)
    sock.sendall(given)
    return sock


def _serve(listener, seconds=0.0):
    """Let a listener look at who is there; whoever gets in should not."""
    with pytest.raises(PeerTimeoutError):
        listener.accept(soon(seconds))


def _meets(listener):
    a, b = connect_to(listener)
    with a, b:
        a.send([b"ping"], soon())
        assert b.receive(10, soon()) == b"ping"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_it_listens_at_the_given_address_and_nowhere_else(host):
    with FrameListener(host) as listener:
        address, port = listener.address
        assert address in ("127.0.0.1", "::1")
        _meets(listener)
        with FrameListener("127.0.0.2", port) as other:
            assert other.address == ("127.0.0.2", port)
        with pytest.raises(ConfigError, match=f"cannot listen at {host}:{port}: .*; give an address of this"):
            FrameListener(host, port)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((address, port), timeout=5)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_address_that_others_reach_needs_a_secret(host, monkeypatch):
    with pytest.raises(ConfigError, match="set TCOMM_SECRET"):
        FrameListener(host)
    with pytest.raises(ConfigError, match="set TCOMM_SECRET"):
        connect_frames("10.1.2.3", 1, soon(0.1))
    monkeypatch.setenv("TCOMM_SECRET", "x")
    with pytest.raises(ConfigError, match="stands for all interfaces; give the address of one"):
        FrameListener(host)


def test_another_secret_is_told_to_both_sides_and_shown_to_none(listening, monkeypatch, caplog):
    monkeypatch.setenv("TCOMM_SECRET", "open sesame")
    connecting = Aside(connect_frames, *listening.address, soon())
    _serve(listening, 0.3)
    with pytest.raises(
        RendezvousError, match="has another secret than this process; set TCOMM_SECRET"
    ) as told:
        connecting.result()
    assert "it has another secret; set TCOMM_SECRET" in caplog.text
    assert "sesame" not in str(told.value) + caplog.text
    assert listening.refused == 1
    with FrameListener("127.0.0.1") as with_secret:
        _meets(with_secret)


def test_a_stranger_sees_nothing_made_with_the_secret(listening):
    with _knock(listening, HELLO) as guest:
        _serve(listening)
        assert len(guest.recv(1000)) == 32
        guest.sendall(bytes(32))
        _serve(listening)
        assert guest.recv(1000) == bytes(33)
        assert guest.recv(1) == b""


def test_another_protocol_gets_no_answer(listening, caplog):
    with _knock(listening, b"GET / HTTP/1.1\r\nHost: tcomm.example.org".ljust(40)) as guest:
        _serve(listening)
        assert guest.recv(1000) == b""
    assert "refused connection 1 to 127.0.0.1:" in caplog.text
    assert "it speaks another protocol" in caplog.text


def test_the_handshake_takes_no_byte_of_the_frame_behind_it(listening):
    with _knock(listening, HELLO) as guest:
        _serve(listening)
        key, nonces = module._master_key(None), bytes(32) + guest.recv(32)
        sending, receiving = module._frame_keys(key, nonces)
        length = (5).to_bytes(8, "little")
        guest.sendall(
            module._derive(key, b"who connects", nonces) + length + sending.tag(length, [b"early"]) + b"early"
        )
        with listening.accept(soon()) as connection:
            assert connection.receive(10, soon()) == b"early"
            connection.send([b"answer"], soon())
        guest.setblocking(False)
        assert guest.recv(33) == b"\x01" + module._derive(key, b"who listens", nonces)
        assert recv_frame(guest, receiving, 10, soon()) == b"answer"


def test_each_handshake_is_fresh_on_both_sides(listening):
    given = set()
    for _ in range(2):
        with _knock(listening, HELLO) as guest:
            _serve(listening)
            given.add(guest.recv(1000))
    assert len(given) == 2
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen_twice():
            for _ in range(2):
                with server.accept()[0] as sock:
                    given.add(sock.recv(1000))

        deaf = Aside(listen_twice)
        with pytest.raises(RendezvousError):
            connect_frames(*server.getsockname(), soon(0.3))
        deaf.result()
    assert len(given) == 4


def test_a_listener_without_the_secret_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def pretend():
            with server.accept()[0] as sock:
                hello = sock.recv(40)
                sock.sendall(hello[8:])
                proof = sock.recv(32)
                sock.sendall(b"\x01" + proof)

        pretending = Aside(pretend)
        with pytest.raises(RendezvousError, match="has another secret than this process"):
            connect_frames(*server.getsockname(), soon())
        pretending.result()


HOSTILE = {
    "nothing": b"",
    "another protocol": b"GET / HTTP/1.1\r\nHost: tcomm.example\r\n\r\n" + bytes(40),
    "a wrong proof": HELLO + bytes(32),
    "an oversize length": b"\xff" * 40,
    "half a greeting": HELLO[:20],
    "a flood": os.urandom(100_000),
}


@pytest.mark.parametrize("given", HOSTILE.values(), ids=HOSTILE.keys())
def test_who_speaks_otherwise_and_leaves_is_dropped_and_counted(listening, given):
    with _knock(listening, given) as guest:
        guest.shutdown(socket.SHUT_WR)
        _serve(listening, 0.05)
        assert listening.refused == 1
        with contextlib.suppress(ConnectionResetError):
            while guest.recv(1000):
                pass
    _meets(listening)


def test_who_is_slow_keeps_nobody_waiting_and_is_dropped_in_time(listening, monkeypatch):
    monkeypatch.setattr(module, "_HANDSHAKE_SECONDS", 0.5)
    guests = [_knock(listening, HELLO[:i]) for i in range(5)]
    with contextlib.ExitStack() as held:
        for guest in guests:
            held.enter_context(guest)
        started = time.monotonic()
        _meets(listening)
        assert time.monotonic() - started < 0.5
        assert listening.refused == 0
        for _ in range(4):
            _serve(listening, 0.2)
            for guest in guests:
                with contextlib.suppress(OSError):
                    guest.send(b"t")
        assert listening.refused == 5


def test_no_more_than_a_few_are_in_the_handshake_at_once(listening, monkeypatch):
    monkeypatch.setattr(module, "_MAX_GUESTS", 3)
    before = len(os.listdir("/proc/self/fd"))
    with contextlib.ExitStack() as held:
        for _ in range(8):
            held.enter_context(_knock(listening))
        _serve(listening, 0.1)
        assert listening.refused == 5
        assert len(os.listdir("/proc/self/fd")) == before + 8 + 3
        _meets(listening)


def test_a_lack_of_descriptors_costs_the_oldest_guest_and_no_more(listening, monkeypatch):
    with _knock(listening), _knock(listening):
        _serve(listening, 0.05)
        failures = [OSError(errno.EMFILE, "too many"), OSError(errno.ECONNABORTED, "gone")]
        accept = socket.socket.accept
        monkeypatch.setattr(
            socket.socket,
            "accept",
            lambda s: (_ for _ in ()).throw(failures.pop()) if failures else accept(s),
        )
        _meets(listening)
        assert not failures
        assert listening.refused == 1


def test_those_who_come_together_are_all_accepted(listening):
    connecting = [Aside(connect_frames, *listening.address, soon()) for _ in range(4)]
    accepted = [listening.accept(soon()) for _ in connecting]
    connected = [aside.result() for aside in connecting]
    for number, connection in enumerate(connected):
        connection.send([bytes([number])], soon())
    assert sorted(bytes(connection.receive(1, soon())) for connection in accepted) == [
        b"\0",
        b"\1",
        b"\2",
        b"\3",
    ]
    for connection in accepted + connected:
        connection.close()


def test_a_deadline_is_kept_and_told(listening):
    started = time.monotonic()
    with pytest.raises(
        PeerTimeoutError, match=r"no process of this job connected to 127.0.0.1:\d+ before the"
    ):
        listening.accept(soon(0.2))
    assert 0.19 < time.monotonic() - started < 5
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(RendezvousError, match=r"no listener of this job answered at 127\.0\.0\.1:"):
            connect_frames(*silent.getsockname(), soon(0.2))
        assert 0.1 < time.monotonic() - started < 5


def test_connecting_waits_for_a_listener_that_comes_later():
    with FrameListener("127.0.0.1") as listener:
        address = listener.address
    connecting = Aside(connect_frames, *address, soon())
    time.sleep(0.15)
    with (
        FrameListener(*address) as listener,
        listener.accept(soon()) as accepted,
        connecting.result() as other,
    ):
        other.send([b"late"], soon())
        assert accepted.receive(10, soon()) == b"late"


class InterruptedByTestError(OSError):
    pass


def _raise_interrupted(*_):
    raise InterruptedByTestError


def _interrupt(*_):
    signal.raise_signal(signal.SIGALRM)


@pytest.mark.parametrize("step", ["_connect", "_receive_guest", "accept"])
def test_what_a_signals_handler_raises_ends_the_call_and_the_next_one_goes_on(listening, monkeypatch, step):
    connect = functools.partial(connect_frames, *listening.address[:2])
    # Where to connect is what is interrupted, a peer beside it would be, too.
    connecting = None if step == "_connect" else Aside(connect, soon())
    with handling(signal.SIGALRM, _raise_interrupted), monkeypatch.context() as patched:
        if step == "accept":
            patched.setattr(listening, "_sock", _Interrupting(listening._sock))
        elif step == "_connect":
            patched.setattr(module, step, _interrupt)
        else:
            patched.setattr(module, step, lambda *_: map(_interrupt, [1]))
        with pytest.raises(InterruptedByTestError):
            (connect if step == "_connect" else listening.accept)(soon())
    connecting = connecting or Aside(connect, soon())
    with listening.accept(soon()) as ours, connecting.result() as theirs:
        theirs.send([b"x"], soon())
        assert ours.receive(1, soon()) == b"x"
    assert not listening._ready


class _Interrupting:
    """A socket on which nobody is accepted before a signal comes."""

    def __init__(self, sock):
        self._sock = sock
        self.fileno = sock.fileno

    def accept(self):
        _interrupt()


def test_closing_drops_whoever_is_there():
    listener = FrameListener("127.0.0.1")
    with _knock(listener, HELLO) as half:
        waiting = Aside(connect_frames, *listener.address, soon())
        accepted = listener.accept(soon())
        in_turn = waiting.result()
        second = Aside(connect_frames, *listener.address, soon())
        while not listener._ready:
            listener._step(0.1)
        unaccepted = second.result()
        listener.close()
        half.recv(32)
        assert half.recv(1) == b""
    with accepted, in_turn, unaccepted:
        with pytest.raises(PeerLostError):
            unaccepted.receive(1, soon())
        in_turn.send([b"x"], soon())
        assert accepted.receive(1, soon()) == b"x"


def test_refusals_do_not_fill_the_log(listening, caplog):
    with caplog.at_level(logging.WARNING, "tcomm"):
        for _ in range(9):
            _knock(listening, bytes(40)).close()
            _serve(listening, 0.02)
    assert listening.refused == 9
    assert [record.args[0] for record in caplog.records] == [1, 2, 4, 8]


@pytest.fixture(scope="module")
def fuzzed():
    with FrameListener("127.0.0.1") as listener:
        yield listener


@hypothesis.settings(max_examples=60, deadline=None, database=None)
@hypothesis.given(
    st.lists(
        st.one_of(
            st.binary(max_size=200),
            st.binary(max_size=80).map(HELLO.__add__),
            st.integers(0, 100_000).map(lambda n: b"\xff" * n),
        ),
        max_size=4,
    )
)
def test_random_bytes_leave_nothing_behind(fuzzed, messages):
    before, refused = len(os.listdir("/proc/self/fd")), fuzzed.refused
    for message in messages:
        sock = _knock(fuzzed)
        with contextlib.suppress(OSError):
            sock.settimeout(0.01)
            sock.sendall(message)
        sock.close()
        _serve(fuzzed, 0.002)
    deadline = soon()
    while fuzzed.refused < refused + len(messages) and time.monotonic() < deadline:
        _serve(fuzzed, 0.01)
    assert fuzzed.refused == refused + len(messages)
    assert len(os.listdir("/proc/self/fd")) == before
    assert not fuzzed._guests


def test_a_valid_process_gets_in_after_all_that_and_memory_has_not_grown(fuzzed):
    _meets(fuzzed)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(200):
        _knock(fuzzed, os.urandom(10_000)).close()
        _serve(fuzzed)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 << 10
    _meets(fuzzed)
