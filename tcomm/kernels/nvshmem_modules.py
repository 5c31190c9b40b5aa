"""Modules of kernels that link NVSHMEM: each has its own copy of the state, which NVSHMEM has to fill in.

That comes after a module is loaded and before its first launch. Triton's global hooks are left alone: whoever
launches such a kernel calls `initialise`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import triton

from tcomm.errors import CapabilityError
from tcomm.interpret import is_interpreted

__all__ = ["DEVICE_STATE", "NvshmemModules", "why_not_linked"]

DEVICE_STATE = "nvshmemi_device_state_d"
"""The symbol that a module has when NVSHMEM is linked into it, and that initialising one without it lacks."""

_OLDEST_TRITON = (3, 7)


def why_not_linked(version: str = triton.__version__) -> str:
    """Why this Triton cannot link NVSHMEM; empty where it can, or interprets and need not."""
    if is_interpreted() or tuple(map(int, version.split(".")[:2])) >= _OLDEST_TRITON:
        return ""
    return f"the LLVM of Triton {version} cannot read NVSHMEM's bitcode; install Triton 3.7 or later"


class NvshmemModules:
    """The modules of this process that NVSHMEM knows.

    Args:
        cumodule_init: of nvshmem4py's bindings; takes the handle of a loaded module, returns 0 or None.
        cumodule_finalize: likewise.
    """

    def __init__(
        self, cumodule_init: Callable[[int], int | None], cumodule_finalize: Callable[[int], int | None]
    ) -> None:
        self._init = cumodule_init
        self._finalize = cumodule_finalize
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def knows(self, kernel: Any) -> bool:
        """Whether `initialise` was called for a compiled kernel, or would do nothing."""
        return kernel in self._known or DEVICE_STATE not in kernel.asm["ptx"]

    def initialise(self, kernel: Any) -> bool:
        """Load a compiled kernel and let NVSHMEM fill in its state, once; False where it links no NVSHMEM.

        Args:
            kernel: what `kernel.warmup(..., grid=grid)` or `triton.compile` returns.

        Raises:
            CapabilityError: when NVSHMEM refuses the module.
        """
        if DEVICE_STATE not in kernel.asm["ptx"]:
            return False
        if kernel not in self._known:
            if kernel.module is None:
                kernel._init_handles()
            if status := self._init(int(kernel.module)):
                raise CapabilityError(
                    f"NVSHMEM cannot initialise the module of {kernel.metadata.name} (status {status}); "
                    "check that it was started in this process, and is of the version of the bitcode"
                )
            self._known[kernel] = int(kernel.module)
        return True

    def finalise(self) -> None:
        """Let NVSHMEM forget all modules, before it is finalised."""
        for module in list(self._known.values()):
            self._finalize(module)
        self._known.clear()
