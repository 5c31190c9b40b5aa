"""What ranks find out about their GPUs, and what they make of it together.

Every rank writes a `DeviceReport`, all ranks get all reports, and `vote` turns them into one `Topology`: the
same on every rank, for it is pure. A "no" of one rank is a "no" of all, and the reason says whose it was.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import msgspec

from tcomm.errors import ConfigError

__all__ = ["DeviceReport", "Topology", "kind_of", "rank_list", "sm_of", "vote"]

_MULTICAST_SM = 90
_MOST_PAIRS = 3
_MODELS = re.compile(r"\b(GB\d{3}|[ABHVL]\d{2,3}S?|MI\d{3}X?)\b", re.IGNORECASE)


class DeviceReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank finds out about its device. A reason is empty where nothing is in the way."""

    name: str
    """As the driver spells it, such as `NVIDIA H100 80GB HBM3`."""
    arch: str
    """`sm_90`, `gfx942`, ..."""
    uuid: str = ""
    """Of the device; ranks that share one have the same. Empty: unknown, and taken for its own."""
    host: str = ""
    """Identity of the operating system's node."""
    fabric: str = ""
    """NVLink domain and clique; empty where there is none."""
    link: str = ""
    """What the peers of a node are reached over: `nvlink4`, `nvlink5`, `pcie5`, ..."""
    link_gbps: float = 0.0
    """GB/s of all links together, in one direction; 0: unknown."""
    nic_gbps: float = 0.0
    """GB/s of this device's share of the network, in one direction; 0: unknown."""
    num_sms: int = 0
    """Multiprocessors."""
    unreachable: dict[int, str] = {}
    """Peers whose memory could not be written and read back, and why."""
    no_multicast: str = ""
    """Why its memory has no multicast address."""
    no_nvshmem: str = ""
    """Why NVSHMEM cannot be used."""
    no_symmetric_memory: str = ""
    """Why it has no memory that peers can map."""
    no_kernels: str = ""
    """Why Triton kernels cannot run on it."""
    driver: str = ""
    """Version of the driver."""
    torch: str = ""
    """Version of torch."""


class Topology(msgspec.Struct, frozen=True, kw_only=True):
    """What all ranks know of all their GPUs: a value that choices depend on, the same on every rank."""

    kind: str
    """Model of the GPUs, as tuning tables name it: `h100`, `h100-pcie`; several joined by `+`."""
    arch: str
    """The weakest of all architectures."""
    nodes: tuple[int, ...]
    """Index of every rank's node: ranks of one node reach one another by load and store."""
    link: str = ""
    """The slowest link inside the nodes."""
    link_gbps: float = 0.0
    """Its GB/s in one direction; 0: unknown."""
    nic_gbps: float = 0.0
    """GB/s of the slowest rank's share of the network; 0: unknown."""
    num_sms: int = 0
    """The smallest number of multiprocessors."""
    shares_device: str = ""
    """Which ranks are on one device; empty where each has its own."""
    no_peer_access: str = ""
    """Which ranks that should reach one another do not, and why."""
    no_multicast: str = ""
    """Which ranks have no multicast, and why."""
    no_nvshmem: str = ""
    """Which ranks have no NVSHMEM, and why."""
    no_symmetric_memory: str = ""
    """Which ranks have no memory that peers can map, and why."""
    no_kernels: str = ""
    """Which ranks cannot run kernels, and why."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.nodes)

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return len(set(self.nodes))

    @property
    def ranks_per_node(self) -> int:
        """Ranks of every node; 0 where nodes differ in it."""
        sizes = {self.nodes.count(node) for node in self.nodes}
        return sizes.pop() if len(sizes) == 1 else 0

    @property
    def ranks_are_in_order(self) -> bool:
        """Whether the ranks of every node follow one another."""
        return list(self.nodes) == sorted(self.nodes)

    @property
    def digest(self) -> str:
        """Hash of all of it: two ranks with the same digest choose alike."""
        return hashlib.blake2b(msgspec.json.encode(self), digest_size=8).hexdigest()


def vote(reports: Sequence[DeviceReport]) -> Topology:
    """What the reports of ranks 0, 1, ... come to. Pure.

    Raises:
        ConfigError: when there is no report, or one speaks of a rank that does not exist.
    """
    if not reports:
        raise ConfigError("a vote without reports; give one DeviceReport for every rank")
    for rank, report in enumerate(reports):
        if unknown := [peer for peer in report.unreachable if not 0 <= peer < len(reports)]:
            raise ConfigError(f"rank {rank} reports on rank {unknown[0]} of {len(reports)} ranks")
    nodes = _nodes(reports)
    slowest = min(reports, key=lambda report: (report.link_gbps, report.link))
    return Topology(
        kind="+".join(sorted({kind_of(report.name, report.link) for report in reports})),
        arch=min((report.arch for report in reports), key=lambda arch: (sm_of(arch), arch)),
        nodes=nodes,
        link=slowest.link,
        link_gbps=slowest.link_gbps,
        nic_gbps=min(report.nic_gbps for report in reports),
        num_sms=min(report.num_sms for report in reports),
        shares_device=_sharing(reports),
        no_peer_access=_missing_peers(reports, nodes),
        no_multicast=_said([_why_no_multicast(report) for report in reports]),
        no_nvshmem=_said([report.no_nvshmem for report in reports]),
        no_symmetric_memory=_said([report.no_symmetric_memory for report in reports]),
        no_kernels=_why_no_kernels(reports),
    )


def sm_of(arch: str) -> int:
    """90 of `sm_90` and `sm_90a`; 0 where it is no NVIDIA architecture."""
    match = re.match(r"sm_(\d+)", arch)
    return int(match[1]) if match else 0


def kind_of(name: str, link: str) -> str:
    """What tables call a GPU: `h100` of `NVIDIA H100 80GB HBM3`, `h100-pcie` where NVLink is missing."""
    match = _MODELS.search(name)
    kind = match[1] if match else re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") or "unknown"
    return kind.lower() + ("-pcie" if link.startswith("pcie") else "")


def rank_list(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0 and 2`, `ranks 0 to 3, 6 and 7`; ranks in ascending order."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words: list[str] = []
    for run in runs:
        words += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else [str(rank) for rank in run]
    joined = " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    return f"rank{'s' if len(ranks) > 1 else ''} {joined}"


def _said(reasons: Sequence[str]) -> str:
    """Every reason once, with the ranks that gave it."""
    by_reason: dict[str, list[int]] = {}
    for rank, reason in enumerate(reasons):
        if reason:
            by_reason.setdefault(reason, []).append(rank)
    return "; ".join(f"{rank_list(ranks)}: {reason}" for reason, ranks in by_reason.items())


def _why_no_multicast(report: DeviceReport) -> str:
    if not report.no_multicast and sm_of(report.arch) < _MULTICAST_SM:
        return f"{report.arch} has no multicast instructions, sm_{_MULTICAST_SM} and later do"
    return report.no_multicast


def _why_no_kernels(reports: Sequence[DeviceReport]) -> str:
    reasons = [_said([r.no_kernels or ("" if r.arch else "its architecture is unknown") for r in reports])]
    known = [(rank, report.arch) for rank, report in enumerate(reports) if report.arch]
    makers = {bool(sm_of(arch)): rank for rank, arch in reversed(known)}
    if len(makers) > 1:
        told = " and ".join(f"rank {rank} {reports[rank].arch}" for rank in sorted(makers.values()))
        reasons.append(f"{told}: the ranks of one call need GPUs of one maker")
    return "; ".join(reason for reason in reasons if reason)


def _sharing(reports: Sequence[DeviceReport]) -> str:
    ranks_of: dict[str, list[int]] = {}
    for rank, report in enumerate(reports):
        if report.uuid:
            ranks_of.setdefault(report.uuid, []).append(rank)
    return "; ".join(f"{rank_list(r)} share {uuid}" for uuid, r in ranks_of.items() if len(r) > 1)


def _nodes(reports: Sequence[DeviceReport]) -> tuple[int, ...]:
    """The connected sets of ranks that reach one another, numbered by their first rank."""
    nodes = [-1] * len(reports)
    for first in range(len(reports)):
        if nodes[first] >= 0:
            continue
        nodes[first] = max(nodes) + 1
        found = [first]
        while found:
            rank = found.pop()
            for peer in range(len(reports)):
                reached = peer not in reports[rank].unreachable and rank not in reports[peer].unreachable
                if nodes[peer] < 0 and reached:
                    nodes[peer] = nodes[first]
                    found.append(peer)
    return tuple(nodes)


def _missing_peers(reports: Sequence[DeviceReport], nodes: Sequence[int]) -> str:
    """The pairs that should reach one another and do not.

    They are on one host, or both reach a third rank, or one of them reaches the other. That ranks of two
    hosts do not reach one another is no fault: they are on two nodes.
    """
    missing = []
    for rank, report in enumerate(reports):
        for peer, why in sorted(report.unreachable.items()):
            one_way = rank not in reports[peer].unreachable
            if one_way or nodes[rank] == nodes[peer] or report.host == reports[peer].host:
                whose = "its own memory" if rank == peer else f"rank {peer}"
                missing.append(f"rank {rank} cannot write to {whose}: {why}")
    more = len(missing) - _MOST_PAIRS
    return "; ".join(missing[:_MOST_PAIRS]) + (f"; and {more} more" if more > 0 else "")
