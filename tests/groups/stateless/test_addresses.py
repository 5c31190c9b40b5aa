import socket

import pytest

from tcomm.errors import ConfigError, RendezvousError
from tcomm.groups.stateless.addresses import (
    address_text,
    bind_listen_socket,
    local_address_towards,
    wait_until_listening,
)


@pytest.mark.parametrize(
    ("host", "port", "text"),
    [("127.0.0.1", 80, "127.0.0.1:80"), ("::1", 80, "[::1]:80"), ("node", 0, "node:0")],
)
def test_an_address_is_written_as_in_a_url(host, port, text):
    assert address_text(host, port) == text


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_it_listens_on_the_address_given_and_nowhere_else(host):
    with bind_listen_socket(host) as listening:
        address, port = listening.getsockname()[:2]
        assert address in ("127.0.0.1", "::1")
        assert port > 0
        wait_until_listening(address, port, 5.0)
        other = "127.0.0.2" if address == "127.0.0.1" else "127.0.0.1"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((other, port), 5.0)


def test_an_address_that_is_taken_is_named():
    with bind_listen_socket("127.0.0.1") as listening:
        port = listening.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            bind_listen_socket("127.0.0.1", port)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_more_than_loopback_needs_a_secret(host, monkeypatch):
    monkeypatch.delenv("TCOMM_SECRET", raising=False)
    monkeypatch.delenv("VLLM_SECRET", raising=False)
    with pytest.raises(ConfigError, match="set TCOMM_SECRET to the same"):
        bind_listen_socket(host)


def test_with_a_secret_it_may_listen_for_other_hosts(monkeypatch):
    monkeypatch.setenv("TCOMM_SECRET", "told to nobody")
    with bind_listen_socket("0.0.0.0") as listening:
        assert listening.getsockname()[0] == "0.0.0.0"


@pytest.mark.parametrize(("host", "port"), [("", 1), ("127.0.0.1", 70000), ("127.0.0.1", "1")])
def test_no_address_is_refused(host, port):
    with pytest.raises(ConfigError, match="give an address and 0 to 65535"):
        bind_listen_socket(host, port)


def test_a_name_without_an_address_is_refused(monkeypatch):
    def fail(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setenv("TCOMM_SECRET", "told to nobody")
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    for call in (bind_listen_socket, lambda *a: wait_until_listening(*a, 1.0), local_address_towards):
        with pytest.raises(ConfigError, match=r"nowhere\.example"):
            call("nowhere.example", 1)


def test_where_nobody_listens_rank_0_is_missing():
    with bind_listen_socket("127.0.0.1") as listening:
        port = listening.getsockname()[1]
    with pytest.raises(RendezvousError) as caught:
        wait_until_listening("127.0.0.1", port, 0.1)
    assert str(caught.value) == (
        f"rank 0 is missing: nobody accepts connections at 127.0.0.1:{port} after 0.1 s "
        "(Connection refused); check the address, and that rank 0 runs"
    )


def test_the_address_towards_loopback_is_loopback():
    assert local_address_towards("127.0.0.1", 0) == "127.0.0.1"
    assert local_address_towards("::1", 5) == "::1"
