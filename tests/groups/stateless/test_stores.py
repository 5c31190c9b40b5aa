import contextlib
import os
import pathlib
import socket
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tcomm.errors import ConfigError, RendezvousError
from tcomm.groups.stateless import stores
from tcomm.groups.stateless.addresses import bind_listen_socket
from tcomm.groups.stateless.stores import (
    create_tcp_store,
    get_cached_tcp_store_client,
    join_at,
    serve_at,
)


def _num_files():
    return len(os.listdir("/proc/self/fd"))


def _listening_at(port):
    """Local addresses at which anybody on this machine listens on a port, as /proc writes them."""
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in pathlib.Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    ends = [fields[1].split(":") for fields in lines if fields[3] == "0A"]
    return [address for address, number in ends if int(number, 16) == port]


LOOPBACK, LOOPBACK_6 = "0100007F", "00000000000000000000000001000000"


def test_a_store_listens_where_it_was_told_and_nowhere_else():
    server = create_tcp_store("127.0.0.1", 0, is_master=True)
    assert _listening_at(server.port) == [LOOPBACK]
    client = create_tcp_store("127.0.0.1", server.port)
    client.set("a", b"1")
    assert server.get("a") == b"1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", server.port), 5.0)
    six = create_tcp_store("::1", 0, is_master=True)
    assert _listening_at(six.port) == [LOOPBACK_6]
    create_tcp_store("::1", six.port).set("a", b"2")
    assert six.get("a") == b"2"


def test_a_socket_that_is_handed_over_belongs_to_the_store():
    listening = bind_listen_socket("127.0.0.1")
    port = listening.getsockname()[1]
    server = create_tcp_store("127.0.0.1", port, listen_socket=listening)
    assert (server.port, listening.fileno()) == (port, -1)
    del server
    with bind_listen_socket("127.0.0.1", port):
        pass


def test_a_socket_is_closed_when_there_is_no_store(monkeypatch):
    monkeypatch.delenv("TCOMM_SECRET", raising=False)
    monkeypatch.delenv("VLLM_SECRET", raising=False)
    listening = socket.create_server(("127.0.0.1", 0))
    with pytest.raises(ConfigError, match="set TCOMM_SECRET"):
        create_tcp_store("0.0.0.0", 0, listen_socket=listening)
    assert listening.fileno() == -1


def test_the_last_client_is_kept():
    server = create_tcp_store("127.0.0.1", 0, is_master=True)
    other = create_tcp_store("127.0.0.1", 0, is_master=True)
    client = get_cached_tcp_store_client("127.0.0.1", server.port)
    assert get_cached_tcp_store_client("127.0.0.1", server.port) is client
    assert get_cached_tcp_store_client("127.0.0.1", other.port) is not client
    client.set("a", b"1")
    assert server.get("a") == b"1"
    stores._cached_client.cache_clear()


def test_groups_of_a_process_share_the_store_of_an_address():
    before = _num_files()
    first = serve_at("127.0.0.1", 0, None, 5.0)
    # Both ends of its own connection are open once it answers.
    assert first.answers()
    served = _num_files()
    assert serve_at("127.0.0.1", first.port, None, 5.0) is first
    clients = [join_at("127.0.0.1", first.port, 5.0) for _ in range(50)]
    assert set(map(id, clients)) == {id(clients[0])}
    # A thread of the server closes its end of each look at whether somebody listens.
    deadline = time.monotonic() + 10
    while _num_files() - served > 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (first.serves, clients[0].serves, first.answers(), clients[0].answers()) == (
        True,
        False,
        True,
        True,
    )
    clients[0].sealed(None, 5.0).set("a", b"1")
    assert first.sealed(None, 5.0).get("a") == b"1"
    assert first.turn("g") is first.turn("g")
    assert first.turn("g") is not first.turn("h")
    port = first.port
    del first
    assert not clients[0].answers()
    again = serve_at("127.0.0.1", port, None, 5.0)
    assert join_at("127.0.0.1", port, 5.0) is not clients[0]
    del again
    clients.clear()
    assert _num_files() <= before + 2


def test_where_nobody_serves_nobody_waits_for_ever():
    with bind_listen_socket("127.0.0.1") as listening:
        port = listening.getsockname()[1]
    with pytest.raises(RendezvousError, match="nobody accepts connections"):
        join_at("127.0.0.1", port, 0.1)


@pytest.fixture(scope="module")
def attacked():
    point = serve_at("127.0.0.1", 0, None, 5.0)
    point.sealed(None, 5.0).set("ours", b"value")
    return point


def _throw(port, data):
    """Connect, send and leave."""
    connection = socket.create_connection(("127.0.0.1", port), 5.0)
    with contextlib.suppress(ConnectionError), connection:
        connection.sendall(data)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=300), st.builds(bytes.__add__, st.sampled_from(
    [bytes([command]) + b"\x00" * 7 for command in range(20)]), st.binary(max_size=60))))  # fmt: skip
def test_random_bytes_change_nothing(attacked, data):
    _throw(attacked.port, data)
    store = attacked.sealed(None, 5.0)
    assert store.get("ours") == b"value"
    assert attacked.store.num_keys() < 70


def test_random_bytes_leave_no_connections(attacked):
    before = _num_files()
    for length in range(0, 200, 5):
        _throw(attacked.port, os.urandom(length))
    assert attacked.sealed(None, 5.0).get("ours") == b"value"
    # The store closes them when it comes to it, which may be after it has answered.
    until = time.monotonic() + 5.0
    while (num_files := _num_files()) > before + 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert num_files <= before + 2
