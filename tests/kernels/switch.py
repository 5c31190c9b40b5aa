"""A switch in software: multimem words over host memory, so that interpreted kernels can be run with them.

It proves offsets, tiles, masks, phases and reuse of the kernels around the words. It proves nothing of the
words themselves, nor of the order in which GPUs see memory.
"""

import dataclasses
import functools

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from tcomm.kernels import all_reduce, exchange, multicast, multimem, reduce_scatter

ADDRESS = 1 << 44
"""Where staging lies behind the switch: nowhere near memory, so that no ordinary access goes unnoticed."""

_DTYPES = {tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16}


class Switch:
    """What the staging of an arena is behind in a rank's own process. Adds in fp32, in rank order."""

    def __init__(self, arena):
        buffer = arena.staging.buffer
        self.staging = dataclasses.replace(arena.staging, multicast=ADDRESS)
        self._memories = [buffer.peer(rank).numpy() for rank in range(buffer.world_size)]
        self.sums, self.stores, self.fences = 0, 0, 0

    def _bytes_at(self, address, mask, full):
        """Index of each byte, [N, 16], of the vectors that count."""
        chosen = np.broadcast_to(mask.handle.data.astype(bool), address.handle.data.shape)
        assert chosen.all() or not _plain(full), "a mask that is not true everywhere is said to be"
        offsets = address.handle.data[chosen] - ADDRESS
        assert (offsets % 16 == 0).all(), f"not at multiples of 16: {offsets}"
        half = self.staging.layout.half_offset
        inside = (half <= offsets) & (offsets + 16 <= half + 2 * self.staging.layout.half_bytes)
        assert inside.all(), f"outside of the halves: {offsets[~inside]}"
        return chosen, offsets[:, None] + np.arange(16)

    def load_sum(self, address, mask, dtype, full):
        """`multimem_load_sum`."""
        chosen, index = self._bytes_at(address, mask, full)
        values = [torch.from_numpy(m[index]).view(_DTYPES[_plain(dtype)]).float() for m in self._memories]
        acc = functools.reduce(torch.add, values)
        words = np.zeros((len(chosen), 4), np.int32)
        words[chosen] = acc.to(_DTYPES[_plain(dtype)]).view(torch.int32).numpy()
        self.sums += 1
        block = tl.block_type(tl.int32, [len(chosen)])
        return tuple(tl.tensor(TensorHandle(column.copy(), tl.int32), block) for column in words.T)

    def store(self, address, mask, a, b, c, d, full):
        """`multimem_store`."""
        chosen, index = self._bytes_at(address, mask, full)
        words = np.stack([word.handle.data.astype(np.int32) for word in (a, b, c, d)], axis=1)[chosen]
        for memory in self._memories:
            memory[index] = np.ascontiguousarray(words).view(np.uint8).reshape(-1, 16)
        self.stores += 1

    def fence(self):
        """`alias_fence`."""
        self.fences += 1


def _plain(value):
    return getattr(value, "value", value)


def use_switch(arena):
    """In a rank's own process: a switch behind `arena`; its launchers stand among the others."""
    switch = Switch(arena)
    multicast.multimem_load_sum, multicast.multimem_store = switch.load_sum, switch.store
    multimem.alias_fence, multimem.multicast_staging_of = switch.fence, lambda _: switch.staging
    all_reduce.LAUNCHERS.update(multimem.LAUNCHERS["all_reduce"])
    exchange.LAUNCHERS.update(multimem.LAUNCHERS["all_gather"])
    reduce_scatter.LAUNCHERS.update(multimem.LAUNCHERS["reduce_scatter"])
    return switch
