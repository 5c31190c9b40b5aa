import json
import logging
import logging.config
import os
import sys

import pytest

from tcomm.errors import ConfigError
from tcomm.groups.helpers import loggers
from tcomm.groups.helpers.loggers import configure_logging, init_logger, register_first_rank


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    for name in list(os.environ):
        if "LOGGING" in name or name == "NO_COLOR":
            monkeypatch.delenv(name)
    monkeypatch.setattr(loggers, "_told", set())
    monkeypatch.setattr(loggers, "_first_rank", {})
    configure_logging.cache_clear()
    logger = logging.getLogger("tcomm")
    kept = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = kept
    configure_logging.cache_clear()


def _message(function, *args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def test_a_thing_is_said_once_at_each_level(caplog):
    logger = init_logger("tcomm.test.once")
    assert logger is logging.getLogger("tcomm.test.once")
    with caplog.at_level(logging.DEBUG, "tcomm"):
        for _ in range(3):
            logger.debug_once("d %s", 1)
            logger.info_once("i %s", 1)
            logger.warning_once("w %s", 1)
        logger.warning_once("w %s", 2)
        logger.info_once("w %s", 2)
        init_logger("tcomm.test.other").warning_once("w %s", 2)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("DEBUG", "d 1"),
        ("INFO", "i 1"),
        ("WARNING", "w 1"),
        ("WARNING", "w 2"),
        ("INFO", "w 2"),
        ("WARNING", "w 2"),
    ]
    assert {record.filename for record in caplog.records} == {"test_loggers.py"}


def test_what_was_not_logged_is_not_remembered(caplog):
    logger = init_logger("tcomm.test.level")
    with caplog.at_level(logging.WARNING, "tcomm"):
        logger.info_once("later")
    with caplog.at_level(logging.INFO, "tcomm"):
        logger.info_once("later")
    assert caplog.messages == ["later"]


@pytest.mark.parametrize("scope", ["global", "local"])
def test_a_scope_lets_its_first_rank_speak(caplog, scope):
    logger = init_logger("tcomm.test.scope")
    logger.warning_once("nobody knows who is first", scope=scope)
    register_first_rank(scope, lambda: False)
    logger.warning_once("not mine", scope=scope)
    logger.warning_once("everybody's")
    register_first_rank(scope, lambda: True)
    logger.warning_once("not mine", scope=scope)
    assert caplog.messages == ["nobody knows who is first", "everybody's", "not mine"]


def test_wrong_scopes_and_arguments_are_refused():
    logger = init_logger("tcomm.test.wrong")
    for say in (logger.debug_once, logger.info_once, logger.warning_once):
        assert _message(say, "x", scope="node") == (
            "scope 'node' is none; give 'process', 'global' or 'local'"
        )
        assert "what is logged once is remembered" in _message(say, "x %s", [1])
    assert _message(register_first_rank, "process", bool) == (
        "scope 'process' has no first rank; give 'global' or 'local'"
    )


def test_a_library_configures_nothing_unasked(monkeypatch):
    before = logging.getLogger("tcomm").handlers[:], logging.getLogger().handlers[:]
    init_logger("tcomm.test")
    assert configure_logging() is False
    monkeypatch.setenv("TCOMM_LOGGING_LEVEL", "DEBUG")
    configure_logging.cache_clear()
    assert configure_logging() is False
    assert (logging.getLogger("tcomm").handlers, logging.getLogger().handlers) == before


@pytest.mark.parametrize("prefix", ["TCOMM", "VLLM"])
def test_the_variables_say_how_lines_look(monkeypatch, capsys, prefix):
    monkeypatch.setenv(f"{prefix}_CONFIGURE_LOGGING", "1")
    monkeypatch.setenv(f"{prefix}_LOGGING_LEVEL", "warning")
    monkeypatch.setenv(f"{prefix}_LOGGING_PREFIX", "100% ")
    monkeypatch.setenv(f"{prefix}_LOGGING_STREAM", "ext://sys.stderr")
    logger = init_logger("tcomm.test.lines")
    logger.info("too low")
    logger.warning("words")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("100% WARNING ")
    assert err.endswith("] words\n")
    assert "[tcomm.test.lines:" in err
    assert logging.getLogger("tcomm").propagate is False
    assert configure_logging() is True


@pytest.mark.parametrize(
    ("colour", "terminal", "no_color", "wanted"),
    [
        ("1", False, "", True),
        ("0", True, "", False),
        ("auto", False, "", False),
        ("auto", True, "", True),
        ("1", True, "yes", False),
    ],
)
def test_levels_are_coloured_where_that_can_be_seen(monkeypatch, capsys, colour, terminal, no_color, wanted):
    monkeypatch.setenv("TCOMM_CONFIGURE_LOGGING", "1")
    monkeypatch.setenv("TCOMM_LOGGING_COLOR", colour)
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    init_logger("tcomm.test.colour").warning("words")
    assert capsys.readouterr().out.startswith("\033[33mWARNING\033[0m " if wanted else "WARNING ")


def test_a_file_configures_all(monkeypatch, tmp_path):
    path = tmp_path / "logging.json"
    path.write_text(json.dumps({"version": 1, "loggers": {"tcomm": {"level": "ERROR"}}}))
    monkeypatch.setenv("VLLM_LOGGING_CONFIG_PATH", str(path))
    monkeypatch.setattr(logging.config, "dictConfig", _told_to := [].append)
    init_logger("tcomm.test")
    assert _told_to.__self__ == [{"version": 1, "loggers": {"tcomm": {"level": "ERROR"}}}]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[1]", "is no JSON object: Expected `object`, got `array`"),
        ("{", "is no JSON object: Input data was truncated"),
        ('{"version": 7}', "is no logging configuration: Unsupported version: 7"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(monkeypatch, tmp_path, text, told):
    path = tmp_path / "logging.json"
    path.write_text(text)
    monkeypatch.setenv("TCOMM_LOGGING_CONFIG_PATH", str(path))
    assert _message(init_logger, "tcomm.test") == f"TCOMM_LOGGING_CONFIG_PATH={path} {told}"


def test_a_file_that_is_missing_or_unwanted_is_refused(monkeypatch, tmp_path):
    path = tmp_path / "none.json"
    monkeypatch.setenv("TCOMM_LOGGING_CONFIG_PATH", str(path))
    assert _message(configure_logging) == (
        f"TCOMM_LOGGING_CONFIG_PATH={path} cannot be read: No such file or directory"
    )
    monkeypatch.setenv("TCOMM_CONFIGURE_LOGGING", "0")
    assert _message(configure_logging) == (
        f"TCOMM_LOGGING_CONFIG_PATH={path} is given and TCOMM_CONFIGURE_LOGGING=0; unset one of them"
    )
