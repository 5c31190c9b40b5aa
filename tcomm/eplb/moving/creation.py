"""Making a communicator of experts by its name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import get_args

import torch
import torch.distributed as dist

from tcomm.config import Config, resolve_timeout
from tcomm.eplb.moving.communicator import EplbCommunicator
from tcomm.eplb.moving.groups import ExpertGroup, size_of
from tcomm.eplb.moving.torch_communicators import TorchGlooCommunicator, TorchNcclCommunicator
from tcomm.errors import ConfigError, NotOfferedError
from tcomm.groups.arguments import UNSET, Timeout, Unset
from tcomm.groups.parallel.coordinator import GroupCoordinator
from tcomm.groups.parallel.eplb_config import EPLBCommunicator
from tcomm.groups.stateless.group import StatelessProcessGroup

__all__ = ["create_eplb_communicator", "seconds_of"]


def seconds_of(timeout: Timeout | Unset) -> float | None:
    """Seconds of a timeout; where none is given, the environment's."""
    return resolve_timeout(Config.from_environment().timeout if isinstance(timeout, Unset) else timeout)


def create_eplb_communicator(
    group_coordinator: ExpertGroup,
    backend: str | None,
    expert_weights: Iterable[torch.Tensor],
    expert_buffer: Sequence[torch.Tensor] = (),
    *,
    timeout: Timeout | Unset = UNSET,
) -> EplbCommunicator:
    """What sends the rows of experts. Not collective.

    Args:
        group_coordinator: the ranks.
        backend: `torch_gloo` or `torch_nccl`; None: gloo where the group has it.
        expert_weights: of one layer. Those in host memory go by gloo, whatever is asked for.
        expert_buffer: what rows are received in, of the same device.
        timeout: of an `execute`: seconds, a profile, or None: as long as it takes.

    Raises:
        ConfigError: when no such backend is known, the tensors are not on one device, or the group is a
            stateless one, which sends no tensors of this size.
        NotOfferedError: a `RuntimeError`, when the backend is known and not offered here, or the group has
            none of its kind.
    """
    size_of(group_coordinator)
    if backend is not None and backend not in get_args(EPLBCommunicator):
        known = ", ".join(get_args(EPLBCommunicator))
        raise ConfigError(f"backend={backend!r} of create_eplb_communicator is none of {known}")
    devices = {tensor.device.type for tensor in [*expert_weights, *expert_buffer]}
    if len(devices) != 1:
        raise ConfigError(f"weights and buffers of experts are on {sorted(devices)}; give one device")
    if isinstance(group_coordinator, StatelessProcessGroup):
        raise ConfigError(
            f"backend={backend!r} cannot serve a StatelessProcessGroup, which sends no weights; give a "
            "process group of torch.distributed"
        )
    if backend not in {None, "torch_gloo", "torch_nccl"}:
        raise NotOfferedError(f"{backend} is not offered here; use torch_gloo or torch_nccl")
    order = ["torch_gloo"] if devices == {"cpu"} else [backend] if backend else ["torch_gloo", "torch_nccl"]
    return _create(group_coordinator, order, seconds_of(timeout))


def _create(
    group: GroupCoordinator | dist.ProcessGroup, order: Sequence[str], seconds: float | None
) -> EplbCommunicator:
    """The first in the order that the group has."""
    on_host, on_device = (
        (group.cpu_group, group.device_group) if isinstance(group, GroupCoordinator) else (group, group)
    )
    for backend in order:
        if backend == "torch_gloo" and _backend_of(on_host, "cpu") == "gloo":
            return TorchGlooCommunicator(on_host, seconds)
        if backend == "torch_nccl" and _backend_of(on_device, "cuda") == "nccl":
            return TorchNcclCommunicator(on_device, seconds)
    raise NotOfferedError(
        f"no {' or '.join(order)} for experts: the group has {dist.get_backend_config(on_device)}; make it "
        "with backend 'cpu:gloo,cuda:nccl'"
    )


def _backend_of(group: dist.ProcessGroup, device: str) -> str:
    """What moves memory of a device in a group; empty where nothing does."""
    pairs = (pair.split(":") for pair in dist.get_backend_config(group).split(","))
    return dict(pair for pair in pairs if len(pair) == 2).get(device, "")
