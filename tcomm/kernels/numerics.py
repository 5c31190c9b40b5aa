"""Which types a kernel reduces, and what it accumulates them in."""

import torch
import triton.language as tl

from tcomm.algorithms import REDUCE_OPS, acc_dtype
from tcomm.errors import CapabilityError, ConfigError

__all__ = ["accumulator_of", "check_reduction", "check_switch_sum"]

_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
}
_SWITCH_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def accumulator_of(dtype: torch.dtype) -> tl.dtype:
    """The Triton type that values of `dtype` are accumulated in."""
    return _TRITON_DTYPES[acc_dtype(dtype)]


def check_reduction(dtype: torch.dtype, op: str) -> None:
    """Check that kernels reduce `dtype` by `op`.

    Raises:
        ConfigError: when they do not.
    """
    if op not in REDUCE_OPS:
        raise ConfigError(f"op {op!r} is not among {', '.join(REDUCE_OPS)}")
    if op == "avg" and not dtype.is_floating_point:
        raise ConfigError(f"the average of {dtype} is not a {dtype}; use sum, or a floating-point tensor")
    if acc_dtype(dtype) not in _TRITON_DTYPES:
        raise ConfigError(f"no kernel reduces {dtype}")


def check_switch_sum(dtype: torch.dtype, op: str) -> None:
    """Check that multimem instructions reduce `dtype` by `op`.

    Raises:
        ConfigError: when no kernel does.
        CapabilityError: when the switch does not.
    """
    check_reduction(dtype, op)
    if op not in {"sum", "avg"} or dtype not in _SWITCH_DTYPES:
        names = ", ".join(str(one).removeprefix("torch.") for one in _SWITCH_DTYPES)
        raise CapabilityError(f"multimem gives sum and avg of {names}, not {op} of {dtype}")
    if op == "avg" and dtype != torch.float32:
        raise CapabilityError(
            f"the switch rounds a sum to {dtype} before it can be divided: avg would be rounded twice; "
            "use sum, or float32"
        )
