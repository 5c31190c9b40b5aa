"""Loggers that can say a thing once, and the configuration of "tcomm"'s."""

from __future__ import annotations

import functools
import logging
import logging.config
import pathlib
import sys
import types
from collections.abc import Callable, Hashable
from typing import ClassVar, Literal, cast

import msgspec

from tcomm.config import EngineConfig
from tcomm.errors import ConfigError

__all__ = ["OnceLogger", "Scope", "configure_logging", "init_logger", "register_first_rank"]

Scope = Literal["process", "global", "local"]
"""Who says a thing: every process, the first rank of all, the first of each host."""

_first_rank: dict[str, Callable[[], bool]] = {}
_told: set[tuple[Hashable, ...]] = set()


def register_first_rank(scope: Literal["global", "local"], is_first: Callable[[], bool]) -> None:
    """Say how to find out whether this process is the first of a scope; until then, each one is.

    Raises:
        ConfigError: when there is no such scope.
    """
    if scope not in {"global", "local"}:
        raise ConfigError(f"scope {scope!r} has no first rank; give 'global' or 'local'")
    _first_rank[scope] = is_first


class OnceLogger(logging.Logger):
    """The type of what `init_logger` returns: a logger that can say a thing once.

    Each message with its arguments is logged once per logger, level and process, however often it is said.
    Arguments are remembered and have to be hashable.
    """

    def debug_once(self, msg: str, *args: Hashable, scope: Scope = "process") -> None:
        """Log at level DEBUG, once.

        Raises:
            ConfigError: when an argument is not hashable, or there is no such scope.
        """
        _log_once(self, logging.DEBUG, msg, args, scope)

    def info_once(self, msg: str, *args: Hashable, scope: Scope = "process") -> None:
        """Log at level INFO, once.

        Raises:
            ConfigError: when an argument is not hashable, or there is no such scope.
        """
        _log_once(self, logging.INFO, msg, args, scope)

    def warning_once(self, msg: str, *args: Hashable, scope: Scope = "process") -> None:
        """Log at level WARNING, once.

        Raises:
            ConfigError: when an argument is not hashable, or there is no such scope.
        """
        _log_once(self, logging.WARNING, msg, args, scope)


def init_logger(name: str) -> OnceLogger:
    """The logger of that name, with the methods of `OnceLogger`; configures logging where that is asked for.

    Raises:
        ConfigError: when the variables of logging make no sense.
    """
    configure_logging()
    logger = logging.getLogger(name)
    for method in (OnceLogger.debug_once, OnceLogger.info_once, OnceLogger.warning_once):
        setattr(logger, method.__name__, types.MethodType(method, logger))
    return cast(OnceLogger, logger)


def _log_once(logger: logging.Logger, level: int, msg: str, args: tuple[Hashable, ...], scope: str) -> None:
    if scope not in {"process", "global", "local"}:
        raise ConfigError(f"scope {scope!r} is none; give 'process', 'global' or 'local'")
    key = (logger.name, level, msg, args)
    try:
        is_told = key in _told
    except TypeError as error:
        raise ConfigError(f"what is logged once is remembered: {error}; give str(x)") from None
    is_mine = scope not in _first_rank or _first_rank[scope]()
    if not is_told and is_mine and logger.isEnabledFor(level):
        _told.add(key)
        # The place in the log is that of the caller of the method.
        logger.log(level, msg, *args, stacklevel=3)


@functools.cache
def configure_logging() -> bool:
    """Configure the logger "tcomm" as the variables ask, once per process; whether they do.

    A library leaves handlers to the program, so nothing happens unless `TCOMM_CONFIGURE_LOGGING=1` or
    `TCOMM_LOGGING_CONFIG_PATH` asks. The root logger is never touched, but by a file that names it.

    Raises:
        ConfigError: when the file does not exist, is no JSON object or no configuration, or is given while
            configuring is turned off.
    """
    config = EngineConfig.from_environment()
    path = config.logging_config_path
    if path and config.configure_logging is False:
        raise ConfigError(
            f"TCOMM_LOGGING_CONFIG_PATH={path} is given and TCOMM_CONFIGURE_LOGGING=0; unset one of them"
        )
    if not path and not config.configure_logging:
        return False
    settings = _read(path) if path else _settings(config)
    try:
        logging.config.dictConfig(settings)
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(f"TCOMM_LOGGING_CONFIG_PATH={path} is no logging configuration: {error}") from error
    return True


def _read(path: str) -> dict[str, object]:
    try:
        return msgspec.json.decode(pathlib.Path(path).read_bytes(), type=dict[str, object])
    except OSError as error:
        raise ConfigError(f"TCOMM_LOGGING_CONFIG_PATH={path} cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"TCOMM_LOGGING_CONFIG_PATH={path} is no JSON object: {error}") from error


def _settings(config: EngineConfig) -> dict[str, object]:
    stream = sys.stderr if config.logging_stream.endswith("stderr") else sys.stdout
    on_terminal = stream is not None and stream.isatty()
    is_coloured = config.logging_color == "1" or (config.logging_color == "auto" and on_terminal)
    prefix = config.logging_prefix.replace("%", "%%")
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "tcomm": {
                "()": _Colours if is_coloured and not config.no_color else logging.Formatter,
                "fmt": f"{prefix}%(levelname)s %(asctime)s [%(name)s:%(lineno)d] %(message)s",
                "datefmt": "%m-%d %H:%M:%S",
            }
        },
        "handlers": {
            "tcomm": {
                "class": "logging.StreamHandler",
                "formatter": "tcomm",
                "stream": config.logging_stream,
            }
        },
        "loggers": {"tcomm": {"handlers": ["tcomm"], "level": config.logging_level, "propagate": False}},
    }


class _Colours(logging.Formatter):
    """Puts the level in colour."""

    CODES: ClassVar[dict[int, int]] = {logging.DEBUG: 37, logging.INFO: 32, logging.WARNING: 33}

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        level = record.levelname
        record.levelname = f"\033[{self.CODES.get(record.levelno, 31)}m{level}\033[0m"
        try:
            return super().format(record)
        finally:
            # Other handlers get the same record.
            record.levelname = level
