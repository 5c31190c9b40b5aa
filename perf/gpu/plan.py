"""What is measured, in which order, what it moves, and how much time there is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

KIB, MIB = 1 << 10, 1 << 20
WORLDS = (8, 2, 4)
SIZES = tuple(KIB * 4**power for power in range(9))
"""1 KiB to 64 MiB."""
FLOAT32_NBYTES = MIB
ALGORITHMS = {
    "all_reduce": ("one_shot_ll", "one_shot_push", "one_shot_pull", "two_shot"),
    "reduce_scatter": ("push", "pull"),
    "all_gather": ("push", "pull"),
    "all_to_all": ("push", "pull"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One row to measure. `nbytes` is counted as nccl-tests does: the longer of a rank's input and output."""

    op: str
    algorithm: str
    world: int
    nbytes: int
    dtype: torch.dtype = torch.bfloat16
    mode: str = "grid"

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.op} {self.algorithm} {name} {size_name(self.nbytes)} of {self.world} ranks"

    @property
    def input_numel(self) -> int:
        """Elements of a rank's input."""
        numel = self.nbytes // self.dtype.itemsize
        return numel // self.world if self.op == "all_gather" else numel

    @property
    def bytes_moved(self) -> int:
        """Bytes that all ranks together have to read and write, staging included.

        A slot, a part and an input have S bytes each below; W ranks do the same. Polls are not counted.
        """
        size, world = self.nbytes, self.world
        part = size // world
        per_rank = {
            # Lanes carry 4 bytes in 8: S in, W S lanes out; W S lanes in, S out.
            ("all_reduce", "one_shot_ll"): 2 * size + 4 * world * size,
            ("all_reduce", "one_shot_push"): 2 * size + 2 * world * size,
            ("all_reduce", "one_shot_pull"): 3 * size + world * size,
            ("all_reduce", "two_shot"): 5 * size + part,
            ("reduce_scatter", "push"): 3 * size + part,
            ("reduce_scatter", "pull"): 3 * size + part,
            ("all_gather", "push"): 3 * size + part,
            ("all_gather", "pull"): 2 * size + 2 * part,
            ("all_to_all", "push"): 4 * size,
            ("all_to_all", "pull"): 4 * size,
        }
        return world * per_rank[self.op, self.algorithm]


def size_name(nbytes: int) -> str:
    for unit, name in ((MIB, "MiB"), (KIB, "KiB")):
        if nbytes >= unit and nbytes % unit == 0:
            return f"{nbytes // unit} {name}"
    return f"{nbytes} B"


def make_plan(
    worlds: tuple[int, ...] = WORLDS, sizes: tuple[int, ...] = SIZES, float32_nbytes: int = FLOAT32_NBYTES
) -> list[Case]:
    """All cases, those first that matter most: time may run out. A world's ranks are made once."""
    cases = []
    for world in worlds:
        for op, algorithms in ALGORITHMS.items():
            # Short and long ones in turn, so that a plan cut short has some of each.
            order = sorted(sizes, key=lambda nbytes: (sizes.index(nbytes) % 2, nbytes))
            for nbytes in order:
                cases += [Case(op, algorithm, world, nbytes) for algorithm in algorithms]
            cases += [Case(op, algorithm, world, float32_nbytes, torch.float32) for algorithm in algorithms]
    return cases


class Budget:
    """Seconds that the whole run may take, by its own clock.

    Args:
        seconds: of the run.
        now: the clock.
    """

    def __init__(self, seconds: float, now: Callable[[], float]) -> None:
        self._now = now
        self._started = now()
        self.seconds = seconds

    @property
    def spent(self) -> float:
        return self._now() - self._started

    def left(self, reserve: float = 0.0) -> float:
        """Seconds until the end, less those that are kept for what comes after."""
        return max(0.0, self.seconds - self.spent - reserve)
