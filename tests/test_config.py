import logging

import pytest

from tcomm.config import TIMEOUT_PROFILES, Config, resolve_timeout
from tcomm.errors import ConfigError


def _message(function, *args):
    with pytest.raises(ConfigError) as caught:
        function(*args)
    return str(caught.value)


def test_without_variables_there_are_defaults():
    assert Config.from_environment({"PATH": "/bin", "XTCOMM_TABLE": "x"}) == Config()


def test_every_variable_is_read():
    given = {
        "TCOMM_ALGORITHM": "two_shot",
        "TCOMM_TIMEOUT": "2.5",
        "TCOMM_STAGING_BYTES": "131072",
        "TCOMM_SHM_DIR": "/tmp/shm",
        "TCOMM_TABLE": "table.json",
        "TCOMM_SPINS": "7",
        "TCOMM_DETERMINISTIC": "1",
        "TCOMM_NVSHMEM_HOME": "/opt/nvshmem",
        "TCOMM_ALLOW_SHARED_DEVICE": "1",
    }
    assert {f"TCOMM_{field.upper()}" for field in Config.__struct_fields__} == set(given)
    wanted = Config("two_shot", "2.5", 131072, "/tmp/shm", "table.json", 7, True, "/opt/nvshmem", True)
    assert Config.from_environment(given) == wanted


def test_the_environment_is_the_process_s_own(monkeypatch):
    monkeypatch.setenv("TCOMM_SPINS", "9")
    assert Config.from_environment().spins == 9


PAGES = "is no positive multiple of the page size, 4096"


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        (
            "STAGING_BYTES",
            "8M",
            "a TCOMM_ variable is wrong: Expected `int`, got `str` - at `$.staging_bytes`",
        ),
        ("STAGING_BYTES", "5000", f"TCOMM_STAGING_BYTES=5000 {PAGES}"),
        ("STAGING_BYTES", "0", f"TCOMM_STAGING_BYTES=0 {PAGES}"),
        ("STAGING_BYTES", "-4096", f"TCOMM_STAGING_BYTES=-4096 {PAGES}"),
        (
            "DETERMINISTIC",
            "maybe",
            "a TCOMM_ variable is wrong: Expected `bool`, got `str` - at `$.deterministic`",
        ),
        ("SPINS", "many", "a TCOMM_ variable is wrong: Expected `int`, got `str` - at `$.spins`"),
        (
            "TIMEOUT",
            "soon",
            "timeout 'soon' is neither seconds nor one of default, ml_inference, batch_job, streaming",
        ),
        ("TIMEOUT", "0", "timeout '0' is not a positive number of seconds"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(variable, value, told):
    assert _message(Config.from_environment, {f"TCOMM_{variable}": value}) == told


@pytest.mark.parametrize(
    ("variable", "told"),
    [
        ("TCOMM_ALGORITM", "TCOMM_ALGORITM is not a variable of tcomm; did you mean TCOMM_ALGORITHM?"),
        (
            "TCOMM_STAGING_BYTE",
            "TCOMM_STAGING_BYTE is not a variable of tcomm; did you mean TCOMM_STAGING_BYTES?",
        ),
        ("TCOMM_XYZZY", "TCOMM_XYZZY is not a variable of tcomm"),
    ],
)
def test_an_unknown_variable_is_a_warning_with_the_closest_name(caplog, variable, told):
    with caplog.at_level(logging.WARNING, "tcomm"):
        assert Config.from_environment({variable: "1"}) == Config()
    assert caplog.messages == [told]


@pytest.mark.parametrize(
    ("given", "seconds"),
    [(None, None), (3, 3.0), (0.5, 0.5), ("7", 7.0), *TIMEOUT_PROFILES.items()],
)
def test_a_timeout_is_a_number_a_profile_or_none(given, seconds):
    assert resolve_timeout(given) == seconds


@pytest.mark.parametrize("given", [0, -1, -0.0, float("nan"), "0", "-3"])
def test_a_timeout_that_is_not_positive_is_refused(given):
    assert _message(resolve_timeout, given) == f"timeout {given!r} is not a positive number of seconds"


@pytest.mark.parametrize("given", ["abc", "", "5 s", [1], object])
def test_a_timeout_that_is_no_number_is_refused(given):
    assert _message(resolve_timeout, given) == (
        f"timeout {given!r} is neither seconds nor one of default, ml_inference, batch_job, streaming"
    )
