"""On what a run was made. Nothing here may end a run: what cannot be found out is left out or said."""

from __future__ import annotations

import contextlib
import os
import pathlib
import platform
import subprocess
from typing import Any

import torch

ROOT = pathlib.Path(__file__).parents[2]


def describe() -> dict[str, Any]:
    """What there is; works without a GPU, too."""
    import triton

    found: dict[str, Any] = {}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "sm": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            # 256 threads of 128 registers, of which a multiprocessor has 65536; a rank has 16 such blocks.
            "blocks_resident_together": properties.multi_processor_count * 2,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    found |= {"torch": torch.__version__, "triton": triton.__version__, "cuda": str(torch.version.cuda)}
    found |= {"python": platform.python_version(), "host_cores": os.cpu_count(), "commit": _commit()}
    return found | clocks()


def clocks() -> dict[str, Any]:
    """Driver and clocks by NVML, where it can be imported."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        sm = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
        return {
            "driver": str(pynvml.nvmlSystemGetDriverVersion()),
            "sm_mhz": sm,
            "sm_mhz_max": pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        }
    except Exception as error:  # noqa: BLE001 - a figure without its clock is still a figure
        return {"driver": _driver(), "clocks": f"not read: {type(error).__name__}: {error}"}


def _driver() -> str:
    with contextlib.suppress(OSError):
        return pathlib.Path("/proc/driver/nvidia/version").read_text().split("\n")[0]
    return "unknown"


def _commit() -> str:
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"],
            cwd=ROOT, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
        return run.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
