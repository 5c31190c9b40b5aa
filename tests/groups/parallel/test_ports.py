import gc
import socket

import pytest

from tcomm.errors import ConfigError
from tcomm.groups.parallel.ports import reserve_ports


class Owner:
    pass


@pytest.fixture(autouse=True)
def _no_start(monkeypatch):
    for name in ("TCOMM_PORT", "VLLM_PORT"):
        monkeypatch.delenv(name, raising=False)


def _bind(port, reuse):
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        taken.bind(("127.0.0.1", port))
        taken.listen()


def test_ports_are_kept_until_their_owner_is_gone_and_given_to_who_names_them():
    owner = Owner()
    ports = reserve_ports("127.0.0.1", 3, owner)
    assert len(set(ports)) == 3
    assert all(1023 < port < 65536 for port in ports)
    for port in ports:
        with pytest.raises(OSError, match="in use"):
            _bind(port, 0)
        _bind(port, 1)
    del owner
    gc.collect()
    for port in ports:
        _bind(port, 0)


def test_a_search_starts_where_it_is_told_and_passes_over_what_is_taken(monkeypatch):
    owner, other = Owner(), Owner()
    start = reserve_ports("127.0.0.1", 1, owner)[0]
    monkeypatch.setenv("VLLM_PORT", str(start))
    found = reserve_ports("127.0.0.1", 2, other)
    assert start < found[0] < found[1]


def test_an_address_that_is_not_of_this_host_has_none(monkeypatch):
    assert reserve_ports("192.0.2.1", 2, Owner()) == []
    monkeypatch.setattr(socket, "getaddrinfo", _unknown)
    assert reserve_ports("nowhere", 2, Owner()) == []


def _unknown(*_, **__):
    raise socket.gaierror(socket.EAI_NONAME, "unknown")


def test_too_few_ports_above_the_start_is_an_error(monkeypatch):
    monkeypatch.setenv("TCOMM_PORT", "65535")
    with pytest.raises(ConfigError) as caught:
        reserve_ports("127.0.0.1", 2, Owner())
    assert str(caught.value) == "no 2 ports from TCOMM_PORT=65535 on are free; give a lower one"
