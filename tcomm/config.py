"""Every `TCOMM_*` variable, read here and nowhere else. `docs/environment.md` is the user's table."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping

import msgspec

from tcomm.errors import ConfigError

__all__ = ["TIMEOUT_PROFILES", "Config", "EngineConfig", "let_ranks_share_a_device", "resolve_timeout"]

logger = logging.getLogger("tcomm")

TIMEOUT_PROFILES: dict[str, float | None] = {
    "default": 120.0,
    "ml_inference": 600.0,
    "batch_job": None,
    "streaming": 1800.0,
}
"""Seconds that a collective may wait, by profile. None: as long as the peers live."""


class Config(msgspec.Struct, frozen=True):
    """The settings of a process, from its environment."""

    algorithm: str = ""
    """TCOMM_ALGORITHM: engine, algorithm or engine:algorithm that every collective must use."""
    timeout: str = "default"
    """TCOMM_TIMEOUT: seconds or a profile, for calls that give none."""
    staging_bytes: int = 8 * 1024 * 1024
    """TCOMM_STAGING_BYTES: staging memory of each rank of a group, until `prepare` makes it larger."""
    shm_dir: str = "/dev/shm"
    """TCOMM_SHM_DIR: memory file system for the CPU transport."""
    table: str = ""
    """TCOMM_TABLE: tuning table to use instead of the one that comes with tcomm; rank 0's counts."""
    spins: int = 0
    """TCOMM_SPINS: polls before a CPU wait yields; 0: by the number of cores."""
    deterministic: bool = False
    """TCOMM_DETERMINISTIC: use nothing that adds in an order of its own, as the switch does."""
    nvshmem_home: str = ""
    """TCOMM_NVSHMEM_HOME: directory of the NVSHMEM whose bitcode kernels link, with `lib` and `include`."""
    allow_shared_device: bool = False
    """TCOMM_ALLOW_SHARED_DEVICE: let several ranks use one GPU, which gives multicast up."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Config:
        """Read and check the variables.

        Raises:
            ConfigError: when one has a value that makes no sense; names it.
        """
        environ = os.environ if environ is None else environ
        given = {k.removeprefix("TCOMM_").lower(): v for k, v in environ.items() if k.startswith("TCOMM_")}
        fields = cls.__struct_fields__
        for unknown in sorted(set(given) - {*fields, *EngineConfig.__struct_fields__}):
            close = difflib.get_close_matches(unknown, fields, 1)
            hint = f"; did you mean TCOMM_{close[0].upper()}?" if close else ""
            logger.warning("TCOMM_%s is not a variable of tcomm%s", unknown.upper(), hint)
        try:
            config = msgspec.convert({k: given[k] for k in fields if k in given}, cls, strict=False)
        except msgspec.ValidationError as error:
            raise ConfigError(f"a TCOMM_ variable is wrong: {error}") from error
        resolve_timeout(config.timeout)
        if config.spins < 0:
            raise ConfigError(f"TCOMM_SPINS={config.spins} is negative; give 0 for the default")
        if config.staging_bytes % 4096 or config.staging_bytes <= 0:
            raise ConfigError(
                f"TCOMM_STAGING_BYTES={config.staging_bytes} is no positive multiple of the page size, 4096"
            )
        return config


class EngineConfig(msgspec.Struct, frozen=True):
    """What the group layer reads: `TCOMM_<NAME>`, or `VLLM_<NAME>` where that is unset."""

    secret: str = ""
    """TCOMM_SECRET: shared by the processes of a job; needed to listen on anything but loopback."""
    host_ip: str = ""
    """TCOMM_HOST_IP: address at which other hosts reach this one."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> EngineConfig:
        """Read and check the variables.

        Raises:
            ConfigError: when one has a value that makes no sense; names it.
        """
        environ = os.environ if environ is None else environ
        given = {}
        for field in cls.__struct_fields__:
            for name in (f"TCOMM_{field.upper()}", f"VLLM_{field.upper()}"):
                if name in environ:
                    given[field] = environ[name]
                    break
        try:
            return msgspec.convert(given, cls, strict=False)
        except msgspec.ValidationError as error:
            raise ConfigError(f"a variable of the group layer is wrong: {error}") from error


def resolve_timeout(timeout: float | str | None) -> float | None:
    """Seconds of a timeout given as a number, a profile or None.

    Raises:
        ConfigError: when it is neither, or not positive.
    """
    if timeout is None:
        return None
    if isinstance(timeout, str) and timeout in TIMEOUT_PROFILES:
        return TIMEOUT_PROFILES[timeout]
    try:
        seconds = float(timeout)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(
            f"timeout {timeout!r} is neither seconds nor one of {', '.join(TIMEOUT_PROFILES)}"
        ) from None
    if not seconds > 0:
        raise ConfigError(f"timeout {timeout!r} is not a positive number of seconds")
    return seconds


def let_ranks_share_a_device() -> None:
    """Have torch map symmetric memory between ranks on one GPU. Before the first such memory is made."""
    if os.environ.get(_TORCH_OVERLAP) != "1":
        os.environ[_TORCH_OVERLAP] = "1"
        logger.info("TCOMM_ALLOW_SHARED_DEVICE: set %s=1 for torch in this process", _TORCH_OVERLAP)


_TORCH_OVERLAP = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
