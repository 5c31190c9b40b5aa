import pytest

from tcomm.errors import ConfigError
from tcomm.objects.secret import is_loopback, job_secret, require_secret


@pytest.fixture(autouse=True)
def _without_secret(monkeypatch):
    for name in ("TCOMM_SECRET", "VLLM_SECRET"):
        monkeypatch.delenv(name, raising=False)


def test_the_secret_is_the_jobs(monkeypatch):
    assert job_secret() is None
    monkeypatch.setenv("TCOMM_SECRET", "")
    assert job_secret() is None
    monkeypatch.setenv("TCOMM_SECRET", "sésame")
    assert job_secret() == "sésame".encode()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost", "::ffff:127.0.0.1"])
def test_loopback_needs_no_secret(host, monkeypatch):
    assert is_loopback(host)
    assert require_secret(host) is None
    monkeypatch.setenv("TCOMM_SECRET", "x")
    assert require_secret(host) == b"x"


@pytest.mark.parametrize("host", ["10.0.0.1", "0.0.0.0", "::", "fe80::1", "::ffff:10.0.0.1"])
def test_other_addresses_need_one(host, monkeypatch):
    assert not is_loopback(host)
    with pytest.raises(
        ConfigError, match=r"reached from other machines.*set TCOMM_SECRET .* or use 127.0.0.1"
    ):
        require_secret(host)
    monkeypatch.setenv("TCOMM_SECRET", "x")
    assert require_secret(host) == b"x"


@pytest.mark.parametrize("host", ["", "no host", "256.1.1.1.invalid", "x" * 300])
def test_what_is_no_address_is_refused(host):
    with pytest.raises(ConfigError, match="is no address and resolves to none"):
        is_loopback(host)


def test_a_name_is_loopback_only_if_all_its_addresses_are(monkeypatch):
    found = [(0, 0, 0, "", ("127.0.0.1", 0)), (0, 0, 0, "", ("10.0.0.1", 0))]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: found)
    assert not is_loopback("two.example")
    found.pop()
    assert is_loopback("two.example")
