"""Addresses, versions and names of things."""

from __future__ import annotations

import importlib
import ipaddress

import torch
from packaging.version import InvalidVersion, Version

from tcomm.errors import ConfigError

__all__ = [
    "get_distributed_init_method",
    "get_tcp_uri",
    "is_torch_equal_or_newer",
    "resolve_obj_by_qualname",
    "supports_custom_op",
]


def get_tcp_uri(ip: str, port: int) -> str:
    """`tcp://ip:port`, with brackets around an IPv6 address.

    Raises:
        ConfigError: when the port is none.
    """
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
        raise ConfigError(f"port {port!r} is none; ports are 0 to 65535")
    try:
        is_six = ipaddress.ip_address(ip).version == 6
    except ValueError:
        is_six = False
    return f"tcp://[{ip}]:{port}" if is_six else f"tcp://{ip}:{port}"


def get_distributed_init_method(ip: str, port: int) -> str:
    """Where the ranks of `torch.distributed.init_process_group` meet: `get_tcp_uri`.

    Raises:
        ConfigError: when the port is none.
    """
    return get_tcp_uri(ip, port)


def resolve_obj_by_qualname(qualname: str) -> object:
    """What `package.module.name` names; the module is imported.

    Args:
        qualname: a module and a name at its top level. Names inside classes are not found.

    Raises:
        ConfigError: when there is no dot with something on both sides.
        ModuleNotFoundError: when there is no such module.
        AttributeError: when the module has no such name.
    """
    module, _, name = qualname.rpartition(".")
    if not module or not name or module.startswith("."):
        raise ConfigError(f"{qualname!r} names nothing in a module; give one such as 'package.module.Name'")
    return getattr(importlib.import_module(module), name)


def is_torch_equal_or_newer(target: str) -> bool:
    """Whether this torch is at least of version `target`; one in development comes before its release.

    Raises:
        ConfigError: when the target is no version.
    """
    try:
        wanted = Version(target)
    except InvalidVersion:
        raise ConfigError(f"{target!r} is no version; give one such as '2.11.0'") from None
    return Version(str(torch.__version__)) >= wanted


def supports_custom_op() -> bool:
    """Whether this torch can have operators defined for it."""
    return hasattr(torch.library, "custom_op")
