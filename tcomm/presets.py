"""Topologies by name, for questions about machines that are not at hand: `h100x8`, `2xh100x8`, `pcie2`.

Each is made of the reports that its ranks would write, put through the same vote as real ones.
"""

from __future__ import annotations

import dataclasses
import re

from tcomm.errors import ConfigError
from tcomm.topology import DeviceReport, Topology, vote

__all__ = ["PRESETS", "named_reports", "named_topology"]

_NO_SWITCH = "there is no NVSwitch"
_FORM = re.compile(r"(?:([1-9]\d*)x)?([a-z]+\d+)(?:x([1-9]\d*))?(-no-multicast)?")
_MOST_RANKS = 1024


@dataclasses.dataclass(frozen=True)
class _Gpu:
    """One model, as its ranks would report it."""

    name: str
    arch: str
    link: str
    link_gbps: float
    num_sms: int
    nic_gbps: float
    domain: int = 8
    """GPUs that reach one another, at most."""
    per_host: int = 8


_GPUS = {
    "v100": _Gpu("Tesla V100-SXM2-16GB", "sm_70", "nvlink2", 150.0, 80, 12.5),
    "a100": _Gpu("NVIDIA A100-SXM4-80GB", "sm_80", "nvlink3", 300.0, 108, 25.0),
    "h100": _Gpu("NVIDIA H100 80GB HBM3", "sm_90", "nvlink4", 450.0, 132, 50.0),
    "h200": _Gpu("NVIDIA H200", "sm_90", "nvlink4", 450.0, 132, 50.0),
    "b200": _Gpu("NVIDIA B200", "sm_100", "nvlink5", 900.0, 148, 50.0),
    "gb200": _Gpu("NVIDIA GB200", "sm_100", "nvlink5", 900.0, 148, 50.0, domain=72, per_host=4),
}
_H100_PCIE = _Gpu("NVIDIA H100 PCIe", "sm_90", "pcie5", 64.0, 114, 25.0)
_A100_PCIE = _Gpu("NVIDIA A100 80GB PCIe", "sm_80", "pcie4", 32.0, 108, 25.0)
_ODD = {
    "pcie2": (_H100_PCIE, _H100_PCIE),
    "mixed": (_A100_PCIE, _A100_PCIE, _H100_PCIE, _H100_PCIE),
}

PRESETS = (
    "h100x8", "b200x8", "h100x8-no-multicast", "2xh100x8", "pcie2", "h200", "h200x8", "a100x8", "v100x4",
    "gb200x72", "mixed",
)  # fmt: skip
"""Names worth trying; every other of the form `[N x]GPUxG[-no-multicast]` is understood too."""


def named_topology(name: str) -> Topology:
    """The topology of that name.

    Raises:
        ConfigError: when it is none; says which there are.
    """
    return vote(named_reports(name))


def named_reports(name: str) -> list[DeviceReport]:
    """What the ranks of the topology of that name would report.

    Raises:
        ConfigError: when it is none; says which there are.
    """
    if name in _ODD:
        everyone = range(len(_ODD[name]))
        return [_report(gpu, r, "0", everyone, len(everyone), _NO_SWITCH) for r, gpu in enumerate(_ODD[name])]
    match = _FORM.fullmatch(name.replace(" ", "").lower())
    gpu = _GPUS.get(match[2]) if match else None
    if match is None or gpu is None:
        raise ConfigError(
            f"topology {name!r} is unknown; give one of {', '.join(PRESETS)}, or NxGPUxG[-no-multicast]: "
            f"N nodes (left out: 1) of G GPUs, each {', '.join(_GPUS)}"
        )
    num_nodes, size = int(match[1] or 1), int(match[3] or 1)
    if size > gpu.domain:
        raise ConfigError(
            f"topology {name!r}: at most {gpu.domain} GPUs of {match[2]} reach one another by load and "
            f"store; give more nodes, as in 2x{match[2]}x{gpu.domain}"
        )
    if num_nodes * size > _MOST_RANKS:
        raise ConfigError(f"topology {name!r} has {num_nodes * size} ranks; give at most {_MOST_RANKS}")
    no_multicast = "a multicast address needs several GPUs" if size == 1 else ""
    if match[4]:
        no_multicast = "switched off for this topology"
    reports = []
    for rank in range(num_nodes * size):
        index = rank // size
        host = f"{index}.{rank % size // gpu.per_host}"
        node = range(index * size, (index + 1) * size)
        reports.append(_report(gpu, rank, host, node, num_nodes * size, no_multicast))
    return reports


def _report(gpu: _Gpu, rank: int, host: str, node: range, world_size: int, no_multicast: str) -> DeviceReport:
    """Of a rank that reaches the ranks of `node`."""
    return DeviceReport(
        name=gpu.name,
        arch=gpu.arch,
        uuid=f"GPU-{rank:04d}",
        host=host,
        fabric=str(node.start) if gpu.link.startswith("nvlink") else "",
        link=gpu.link,
        link_gbps=gpu.link_gbps,
        nic_gbps=gpu.nic_gbps,
        num_sms=gpu.num_sms,
        unreachable={peer: "it is on another node" for peer in range(world_size) if peer not in node},
        no_multicast=no_multicast,
    )
