"""What is measured on, and the clocks of it. A test gives another one."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from tcomm import VirtualRanks
from tcomm.memory.virtual import Mode

SLEEP_CYCLES = 200_000
"""About 0.1 ms that the GPU is kept busy for, while the host launches what is timed behind it."""
L2_BYTES = 256 << 20
"""More than any GPU's L2 holds."""


class CudaDevice:
    """The current GPU.

    Args:
        flush_l2: before each timed call, so that nothing it reads is in cache.
    """

    copy_nbytes = 256 << 20
    """Read and written once each by the copy that gives the bandwidth."""

    def __init__(self, flush_l2: bool = False) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.flush_l2 = flush_l2
        self._flushed = torch.empty(L2_BYTES if flush_l2 else 0, dtype=torch.uint8, device=self.device)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def now(self) -> float:
        """Seconds of the host."""
        return time.perf_counter()

    def make_ranks(self, world: int, max_nbytes: int, mode: Mode) -> VirtualRanks:
        ranks = VirtualRanks(world, self.device, mode=mode, staging_bytes=1 << 20, timeout=10.0)
        ranks.prepare(max_nbytes)
        return ranks

    def capture(self, run: Callable[[], object], calls: int) -> Callable[[], object]:
        """A replay of so many calls; each was made before."""
        run()
        self.synchronise()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                run()
        return graph.replay

    def seconds(self, run: Callable[[], object]) -> float:
        """How long the GPU takes for what `run` launches, without what the host takes to launch the first."""
        start, end = self._events
        if self.flush_l2:
            self._flushed.zero_()
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def synchronise(self) -> None:
        torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Give memory back that is held for reuse."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
