"""Two kernels to compare with: one that does nothing, and one that only reads."""

from __future__ import annotations

import torch

from tcomm.kernels.launch import launches  # noqa: F401 - decides whether kernels are interpreted

import triton  # isort: skip
import triton.language as tl  # isort: skip

BLOCK = 4096
PROGRAMS = 128


@triton.jit
def _empty_kernel(sink_ptr):
    pass


@triton.jit
def _read_kernel(x_ptr, sink_ptr, num_words, BLOCK: tl.constexpr):  # noqa: N803
    """sink[program] = the largest of the words that the program read: nothing can be left out."""
    most = tl.full((), -(2**31), tl.int32)
    start = tl.program_id(0) * BLOCK
    while start < num_words:
        offs = start + tl.arange(0, BLOCK)
        words = tl.load(x_ptr + offs, mask=offs < num_words, other=-(2**31))
        most = tl.maximum(most, tl.max(words, axis=0))
        start += tl.num_programs(0) * BLOCK
    tl.store(sink_ptr + tl.program_id(0), most)


def nothing(sink: torch.Tensor) -> None:
    _empty_kernel[(1,)](sink)


def read(words: torch.Tensor, sink: torch.Tensor) -> None:
    """Read all of `words`, [n] int32; `sink` has PROGRAMS of them."""
    programs = max(1, min(PROGRAMS, triton.cdiv(words.numel(), BLOCK)))
    _read_kernel[(programs,)](words, sink, words.numel(), BLOCK=BLOCK)
