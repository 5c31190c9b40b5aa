"""NVSHMEM's device functions as LLVM bitcode: which file a GPU needs, where it lies, and its version.

Host library and bitcode have to be of one version, or kernels hang or write to wrong places. So bitcode is
taken from beside the host library that this process has loaded, where it has loaded one, and its version is
read from the headers that were installed with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import pathlib
import re

from tcomm.errors import CapabilityError

__all__ = ["Bitcode", "choose_architecture", "find_bitcode"]

_HOST_LIBRARY = "libnvshmem_host.so"
_OLD_NAME = "libnvshmem_device.bc"
_PER_ARCHITECTURE = re.compile(r"libnvshmem_device_sm_(\d+)\.bc")
_PACKAGES = ("nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12")
_HEADER = pathlib.Path("include", "non_abi", "nvshmem_version.h")
_REMEDY = "install it with `pip install tcomm[nvshmem]`, or name its directory in TCOMM_NVSHMEM_HOME"


@dataclasses.dataclass(frozen=True)
class Bitcode:
    """A file that a kernel links, and the version of the NVSHMEM that it came with."""

    path: pathlib.Path
    version: str
    """`major.minor.patch`."""

    @property
    def link_options(self) -> dict[str, dict[str, str]]:
        """What `triton.compile` and launches take to link it."""
        return {"extern_libs": {"libnvshmem_device": str(self.path)}}


def choose_architecture(capability: int, available: list[int]) -> int | None:
    """The architecture to link for a GPU: the highest not above its own, of the same major.

    Architectures are 10 * major + minor: 86 takes 80 where there is no 86, 103 takes 100; 120 takes no 100.
    """
    fitting = [arch for arch in available if arch <= capability and arch // 10 == capability // 10]
    return max(fitting, default=None)


def find_bitcode(capability: int, home: str = "", maps: str = "/proc/self/maps") -> Bitcode:
    """The bitcode for a GPU.

    Args:
        capability: of the GPU, 10 * major + minor.
        home: directory of an NVSHMEM, with `lib` and `include`; only that is looked into where given.
        maps: lists the libraries that this process has loaded.

    Raises:
        CapabilityError: when there is none; says what was looked for, where, and what to do.
    """
    looked: list[str] = []
    for directory in _directories(home, maps):
        names = {path.name: path for path in directory.glob("libnvshmem_device*.bc")}
        numbers = [int(found[1]) for name in names if (found := _PER_ARCHITECTURE.fullmatch(name))]
        chosen = choose_architecture(capability, numbers)
        name = _OLD_NAME if chosen is None else f"libnvshmem_device_sm_{chosen}.bc"
        if name in names:
            return Bitcode(names[name], _version_beside(directory))
        looked.append(f"{directory} (has {', '.join(sorted(names)) or 'none'})")
    where = "; ".join(looked) or "no NVSHMEM is loaded or installed"
    raise CapabilityError(
        f"no NVSHMEM bitcode for sm_{capability}: looked for libnvshmem_device_sm_N.bc of its major, N at "
        f"most {capability}, and {_OLD_NAME} in {where}; {_REMEDY}"
    )


def _directories(home: str, maps: str) -> list[pathlib.Path]:
    """Where libraries of NVSHMEM may lie, the best first."""
    if home:
        return [pathlib.Path(home) / "lib"]
    found = [*_loaded_directories(maps), *_installed_directories()]
    return list(dict.fromkeys(found))


def _loaded_directories(maps: str) -> list[pathlib.Path]:
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = pathlib.Path(maps).read_text().splitlines()
    paths = [pathlib.Path(line.split(maxsplit=5)[5]) for line in lines if _HOST_LIBRARY in line]
    return [path.parent for path in paths if path.name.startswith(_HOST_LIBRARY)]


def _installed_directories() -> list[pathlib.Path]:
    try:
        spec = importlib.util.find_spec("nvidia.nvshmem")
    except ModuleNotFoundError:
        return []
    return [pathlib.Path(p) / "lib" for p in (spec.submodule_search_locations or ())] if spec else []


def _version_beside(directory: pathlib.Path) -> str:
    """Version of the NVSHMEM that `directory` belongs to.

    Raises:
        CapabilityError: when nothing there tells it.
    """
    header = directory.parent / _HEADER
    if header.exists():
        parts = re.findall(r"NVSHMEM_VENDOR_(?:MAJOR|MINOR|PATCH)_VERSION\s+(\d+)", header.read_text())
        if len(parts) == 3:
            return ".".join(parts)
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            distribution = importlib.metadata.distribution(package)
            owned = pathlib.Path(str(distribution.locate_file("nvidia/nvshmem/lib")))
            if owned.exists() and owned.samefile(directory):
                return ".".join(distribution.version.split(".")[:3])
    raise CapabilityError(f"the version of the NVSHMEM in {directory} is unknown: no {header}; {_REMEDY}")
