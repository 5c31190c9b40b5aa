"""What only a CUDA device has, as inline PTX. The interpreter and HIP never come here."""

import triton
import triton.language as tl

__all__ = ["nanoseconds"]


@triton.jit
def nanoseconds():
    """The clock that all SMs of a GPU share, in nanoseconds. It moves in steps of up to a microsecond."""
    return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], tl.int64, is_pure=False, pack=1)
