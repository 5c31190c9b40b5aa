"""What a rank finds out about its GPU, once: what it is, what it is linked by, and whom it reaches.

That peers can be reached is proved and not asked: each rank writes into every rank's page what only it would
write there, and everybody looks at what came. Drivers promise peer access on machines where it does not work.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import secrets
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from tcomm.memory.base import Exchange, SymmetricBuffer
from tcomm.memory.control import PROBE_WORDS, PROBES
from tcomm.memory.liveness import my_identity
from tcomm.topology import DeviceReport

__all__ = ["describe_device", "host_identity", "prove_access"]

logger = logging.getLogger("tcomm")

_GBPS_OF_NVLINK = {2: 25.0, 3: 25.0, 4: 25.0, 5: 50.0}
"""GB/s of one NVLink in one direction, by version."""
_GENERATION_OF_NVLINK = {1: 1, 2: 2, 3: 2, 4: 3, 5: 3, 6: 4, 7: 5}
"""By NVML's number of the version, which counts 2.2 and 3.1, too."""
_GBPS_OF_PCIE_LANE = {3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
_MAX_LINKS = 18


def host_identity() -> str:
    """The same for processes under one operating system."""
    return my_identity().namespace.partition("/")[0]


def describe_device(device: torch.device, no_multicast: str, unreachable: dict[int, str]) -> DeviceReport:
    """What this rank reports on its device.

    Args:
        device: a CUDA device, with an index.
        no_multicast: why its memory has no multicast address; empty where it has one.
        unreachable: what `prove_access` found.
    """
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        arch = str(properties.gcnArchName).partition(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    uuid = str(getattr(properties, "uuid", ""))
    report = DeviceReport(
        name=properties.name,
        arch=arch,
        uuid=uuid,
        host=host_identity(),
        num_sms=properties.multi_processor_count,
        unreachable=unreachable,
        no_multicast=no_multicast,
        torch=str(torch.__version__),
    )
    return msgspec.structs.replace(report, **_links(uuid))


def _links(uuid: str) -> dict[str, Any]:
    """Fields of a report that only NVML knows; none of them without it."""
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception as error:  # noqa: BLE001 - a library that may be missing, or without a driver
        logger.warning(
            "the links of %s are not known and taken for slow ones, because NVML cannot be asked: %s; "
            "pip install nvidia-ml-py",
            uuid,
            error,
        )
        return {}
    found: dict[str, Any] = {}
    with contextlib.suppress(nvml.NVMLError):
        found["driver"] = str(nvml.nvmlSystemGetDriverVersion())
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        found |= _nvlinks(nvml, handle) or _pcie(nvml, handle)
        found["fabric"] = _fabric(nvml, handle)
    return found


def _nvlinks(nvml: Any, handle: Any) -> dict[str, Any]:
    active, version = 0, 0
    for link in range(_MAX_LINKS):
        with contextlib.suppress(nvml.NVMLError):
            if nvml.nvmlDeviceGetNvLinkState(handle, link):
                active += 1
                version = max(version, int(nvml.nvmlDeviceGetNvLinkVersion(handle, link)))
    if not active:
        return {}
    generation = _GENERATION_OF_NVLINK.get(version, 0)
    return {"link": f"nvlink{generation or ''}", "link_gbps": active * _GBPS_OF_NVLINK.get(generation, 0.0)}


def _pcie(nvml: Any, handle: Any) -> dict[str, Any]:
    generation = int(nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle))
    width = int(nvml.nvmlDeviceGetMaxPcieLinkWidth(handle))
    return {"link": f"pcie{generation}", "link_gbps": width * _GBPS_OF_PCIE_LANE.get(generation, 0.0)}


def _fabric(nvml: Any, handle: Any) -> str:
    """NVLink domain and clique of machines that share one across hosts; empty elsewhere."""
    with contextlib.suppress(nvml.NVMLError, AttributeError):
        info = nvml.c_nvmlGpuFabricInfoV_t()
        info.version = nvml.nvmlGpuFabricInfo_v2
        nvml.nvmlDeviceGetGpuFabricInfoV(handle, ctypes.byref(info))
        domain = bytes(info.clusterUuid).hex()
        return f"{domain}/{info.cliqueId}" if domain.strip("0") else ""
    return ""


def prove_access(
    exchange: Exchange,
    control: SymmetricBuffer,
    settle: Callable[[], None],
    timeout: float,
    check: Callable[[], None] | None = None,
) -> dict[int, str]:
    """Write to every rank and read from every rank, and find out what came. **Collective.**

    Args:
        exchange: reaches the other ranks.
        control: pages on the devices, with nothing in flight.
        settle: waits for this rank's device.
        timeout: seconds for each step.
        check: called while this rank waits for others.

    Returns:
        The ranks that this one cannot write to or read from, and why; those too that have no address here.

    Raises:
        RendezvousError: when a rank did not come in time.
    """
    rank, world_size = exchange.rank, exchange.world_size
    nonces = exchange.all_gather(secrets.token_bytes(8), timeout, check)
    nonce = int.from_bytes(nonces[0], "little")
    problem = _write_everywhere(control, settle, nonce)
    problems = exchange.all_gather(problem.encode(), timeout, check)
    missing: dict[int, str] = {}
    unread: dict[int, str] = {}
    if not any(problems):
        reached = [peer for peer in range(world_size) if peer not in control.unreachable]
        missing = {w: why for w in reached if (why := _look(control, rank, w, rank, nonce))}
        unread = {p: f"reading: {why}" for p in reached if (why := _look(control, p, p, rank, nonce))}
    found = exchange.all_gather(msgspec.msgpack.encode(missing), timeout, check)
    if any(problems):
        told = "; ".join(f"rank {r}: {p.decode()}" for r, p in enumerate(problems) if p)
        return {peer: told for peer in range(world_size) if problems[peer] or problem} | dict(
            control.unreachable
        )
    verdicts = [msgspec.msgpack.decode(data, type=dict[int, str]) for data in found]
    unwritten = {p: f"writing: {verdict[rank]}" for p, verdict in enumerate(verdicts) if rank in verdict}
    return unread | unwritten | dict(control.unreachable)


def _pattern(writer: int, reader: int, nonce: int) -> torch.Tensor:
    """[PROBE_WORDS] int64 that nobody else writes to anybody else."""
    seed = (nonce ^ (writer << 32 | reader + 1) * 0x9E3779B97F4A7C15) & 0x7FFFFFFFFFFFFFFF
    words = [(seed * (2 * i + 1) + i) & 0x7FFFFFFFFFFFFFFF for i in range(PROBE_WORDS)]
    return torch.tensor(words, device="cpu")


def _write_everywhere(control: SymmetricBuffer, settle: Callable[[], None], nonce: int) -> str:
    """Write this rank's pattern into every page; what went wrong, if anything."""
    writer = control.rank
    try:
        for reader in set(range(control.world_size)) - set(control.unreachable):
            place = _place(control, reader, writer)
            # A sum is a kernel's loads and stores, which a copy need not be.
            torch.add(_pattern(writer, reader, nonce).to(place.device), 0, out=place)
        settle()
    except RuntimeError as error:
        return f"writing to its peers failed: {str(error).strip().partition(chr(10))[0]}"
    return ""


def _place(control: SymmetricBuffer, reader: int, writer: int) -> torch.Tensor:
    return control.peer(reader, (PROBE_WORDS,), torch.int64, (PROBES + writer * PROBE_WORDS) * 8)


def _look(control: SymmetricBuffer, page: int, writer: int, looker: int, nonce: int) -> str:
    """What is wrong with the words of `writer` in a page, as `looker` sees them; empty when right."""
    try:
        seen = torch.add(_place(control, page, writer), 0).cpu()
    except RuntimeError as error:
        return str(error).strip().partition("\n")[0]
    wanted = _pattern(writer, page, nonce)
    if torch.equal(seen, wanted):
        return ""
    right = int((seen == wanted).sum())
    return (
        f"{PROBE_WORDS - right} of {PROBE_WORDS} words that rank {writer} wrote are wrong for rank {looker}"
    )
