"""Whether kernels are interpreted in this process. Imported before Triton is."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys

import torch

from tcomm.errors import CapabilityError

__all__ = ["choose_interpreter", "is_interpreted", "why_not_runnable"]

logger = logging.getLogger("tcomm")

_VARIABLE = "TRITON_INTERPRET"


def choose_interpreter() -> None:
    """Turn Triton's interpreter on where it is the only way to run a kernel.

    Triton decides when a function is decorated, its own library included, so this has to come before
    `import triton`. An explicit `TRITON_INTERPRET`, 0 or 1, is left as it is.

    Raises:
        CapabilityError: when Triton was imported before, without the interpreter, and there is no GPU.
    """
    if os.environ.get(_VARIABLE) is not None or _has_gpu():
        return
    if "triton" in sys.modules and not is_interpreted():
        raise CapabilityError(
            "there is no GPU and Triton was imported before tcomm's kernels without its interpreter; "
            f"set {_VARIABLE}=1 before the first import of triton"
        )
    os.environ[_VARIABLE] = "1"
    logger.info("no GPU here: Triton kernels are interpreted (%s=1)", _VARIABLE)


def why_not_runnable() -> str:
    """Why kernels cannot run on host memory in this process; empty when they can. Imports nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if os.environ.get(_VARIABLE, "").lower() in {"0", "off", "false", "no"}:
        return f"{_VARIABLE}={os.environ[_VARIABLE]} turns the interpreter off"
    if os.environ.get(_VARIABLE) is None and _has_gpu():
        return f"kernels are compiled for the GPU here; set {_VARIABLE}=1 to interpret them"
    if "triton" in sys.modules and not is_interpreted():
        return f"Triton was imported without {_VARIABLE}=1"
    return ""


def is_interpreted() -> bool:
    """Whether the kernels of this process run in Triton's interpreter."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(tl.zeros, InterpretedFunction)


def _has_gpu() -> bool:
    built_for_gpu = torch.version.cuda is not None or torch.version.hip is not None
    return built_for_gpu and torch.cuda.is_available()
