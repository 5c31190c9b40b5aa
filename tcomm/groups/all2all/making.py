"""Managers by the name of their backend."""

from __future__ import annotations

from typing import cast

import torch.distributed as dist

from tcomm.errors import ConfigError
from tcomm.groups.all2all.base import All2AllManagerBase
from tcomm.groups.all2all.choice import BACKENDS
from tcomm.groups.helpers.names import resolve_obj_by_qualname
from tcomm.groups.stateless.group import StatelessProcessGroup

__all__ = ["make_manager"]


def make_manager(
    backend: str,
    cpu_group: dist.ProcessGroup | StatelessProcessGroup,
    tcp_store_group: StatelessProcessGroup | None = None,
) -> All2AllManagerBase:
    """The manager of a backend. **Collective.**

    Args:
        backend: a name of `BACKENDS`.
        cpu_group: the ranks that experts are spread over.
        tcp_store_group: as for `All2AllManagerBase`.

    Raises:
        ConfigError: when there is no such backend.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"all2all backend {backend!r} is unknown; give one of {', '.join(BACKENDS)}")
    kind = cast("type[All2AllManagerBase]", resolve_obj_by_qualname(BACKENDS[backend]))
    return kind(cpu_group) if tcp_store_group is None else kind(cpu_group, tcp_store_group)
