"""Virtual ranks in the interpreter: each rank runs in a thread, and they take turns where one waits.

One thread runs at a time, so nothing here races; a wait hands over to the next rank. Triton's interpreter
keeps the grid index in one object, so whoever gets the turn back sets its own again.
"""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime.interpreter import interpreter_builder

from tcomm.kernels.hooks import interpreting
from tcomm.memory.base import LaunchPart

__all__ = ["run_in_turns"]

_Look = Callable[[int, int, int], int]

_seconds_between_looks = 0.0005
_held: Callable[[], None] | None = None


def _run_held() -> int:
    if _held is None:
        raise AssertionError("nothing is to be run")
    _held()
    return 0


@triton.jit
def _holder():
    """Run `_held` while the language is patched for the interpreter, so that no thread of it undoes that."""
    _run_held()
    tl.full((), 0, tl.int32)


class _Turns:
    """Threads of which one runs at a time. What an interpreted kernel waits by."""

    def __init__(self, timeout: float | None, order: random.Random | None, look: _Look | None) -> None:
        self._look = look
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._order = order
        self._local = threading.local()
        self._turns: list[threading.Semaphore] = []
        self._running: list[int] = []
        self._over = threading.Event()
        self.failure: BaseException | None = None

    @property
    def axis_rank(self) -> int:
        """Which of the ranks of its launch this thread works for."""
        rank: int = self._local.axis_rank
        return rank

    def run(self, jobs: Sequence[tuple[Callable[[], None], int]]) -> None:
        """Run each job (what to do, rank along the axis) in a thread, to the end of all."""
        self._turns = [threading.Semaphore(0) for _ in jobs]
        self._running = list(range(len(jobs)))
        threads = [
            threading.Thread(target=self._work, args=(index, *job), daemon=True)
            for index, job in enumerate(jobs)
        ]
        for thread in threads:
            thread.start()
        self._turns[0].release()
        self._over.wait()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def _work(self, index: int, job: Callable[[], None], axis_rank: int) -> None:
        self._local.index, self._local.axis_rank = index, axis_rank
        self._turns[index].acquire()
        try:
            with np.errstate(all="ignore"):
                job()
        except BaseException as error:  # noqa: BLE001 - raised by `run`, in the thread that asked for it
            self.failure = self.failure or error
        self._running.remove(index)
        if self._running:
            self._turns[self._next(index)].release()
        else:
            self._over.set()

    def _next(self, index: int) -> int:
        others = [other for other in self._running if other != index]
        if self._order is not None:
            return self._order.choice(others)
        return min(others, key=lambda other: (other - index) % len(self._turns))

    def kernel_pause(self, phase: int, block: int, word: int) -> int:
        """Let another rank run; 1 past the deadline, or when a rank has failed."""
        if self._look is not None and self._look(phase, block, word):
            return 1
        index: int = self._local.index
        if self.failure is not None or (self._deadline is not None and time.monotonic() > self._deadline):
            return 1
        if len(self._running) > 1:
            self._turns[self._next(index)].release()
            self._turns[index].acquire()
            interpreter_builder.set_grid_idx(block, 0, 0)
        else:
            time.sleep(_seconds_between_looks)
        return 0


def run_in_turns(
    parts: Sequence[LaunchPart],
    launch: Callable[[int], Any],
    timeout: float | None,
    order: random.Random | None = None,
    look: _Look | None = None,
) -> None:
    """Interpret the launches of all virtual ranks, in one process.

    Args:
        parts: the launches, and how many ranks each is for.
        launch: launches for the ranks from the given one on.
        timeout: seconds that all waits may take together; None: for ever.
        order: draws who is next; round robin without it.
        look: given phase, block and word of each poll; 1 when waits are to end.
    """
    global _held  # noqa: PLW0603 - guarded by `interpreting`
    turns = _Turns(timeout, order or _order, look)

    def run_all() -> None:
        turns.run(
            [(functools.partial(launch, part.rank), axis) for part in parts for axis in range(part.num_ranks)]
        )

    with interpreting(turns):
        _held = run_all
        try:
            _holder[(1,)]()
        finally:
            _held = None


_order: random.Random | None = None
