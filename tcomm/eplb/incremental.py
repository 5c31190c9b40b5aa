"""From the map in force to a better one that is not far away."""

from __future__ import annotations

import dataclasses

import numpy as np

from tcomm.eplb.search import Budget, improved
from tcomm.eplb.shapes import FloatArray, IntArray, LoadArray, Shape, checked_load, checked_map
from tcomm.errors import ConfigError

__all__ = ["CopyCosts", "nearby_map"]

_ROUNDS = 200


@dataclasses.dataclass(frozen=True)
class CopyCosts:
    """What it costs to move an expert, and for how long the plan will be used.

    Raises:
        ConfigError: when a number is not above 0.
    """

    bytes_per_expert: float
    """Bytes of the weights of one expert in one layer."""
    link_gbps: float
    """Gigabytes a second that reach one GPU. A copy counts as if all GPUs stood still for it."""
    horizon_tokens: float
    """Tokens to come before the next plan."""
    seconds_per_token: float = 2e-7
    """Time that a GPU takes for one token in one expert."""
    top_k: int = 8
    """Experts of a token."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not 0 < value < float("inf"):
                raise ConfigError(f"{field.name}={value!r} is wrong; give a number above 0")

    def price(self, load: FloatArray) -> FloatArray:
        """What a copy costs in load of a layer's busiest GPU: [L], of a load [L, E].

        The load is a sample of what is to come: `horizon_tokens * top_k` choices in the same proportions.
        """
        seconds = self.bytes_per_expert / (self.link_gbps * 1e9)
        choices = self.horizon_tokens * self.top_k * self.seconds_per_token
        total: FloatArray = load.sum(axis=1)
        return total * (seconds / choices)


def nearby_map(
    load: LoadArray,
    current: LoadArray,
    shape: Shape,
    max_moves: int | None = None,
    costs: CopyCosts | None = None,
) -> IntArray:
    """The best map found within the budget; the steps taken first are those that gain most for a move.

    Experts stay on their nodes where `shape` keeps groups on nodes. A layer without load stays as it is.

    Args:
        load: [L, E].
        current: [L, P], the map in force.
        shape: the numbers.
        max_moves: slots of a layer whose expert is copied from another GPU, at most; None: any number.
        costs: what a copy costs; None: nothing. With it a layer stops where the next copies would cost more
            time than they save.

    Returns:
        [L, P].

    Raises:
        ConfigError: when load, map or number of moves make no sense.
    """
    values = checked_load(load, np.float64)
    start = checked_map("the current map", current, len(values), shape)
    if max_moves is not None and (
        isinstance(max_moves, bool) or not isinstance(max_moves, int) or max_moves < 0
    ):
        raise ConfigError(f"max_moves={max_moves!r} is wrong; give a number of slots of a layer, 0 or more")
    price = np.zeros(len(values)) if costs is None else costs.price(values)
    budget = Budget(shape.num_replicas if max_moves is None else max_moves, price)
    return improved(start, values, shape, budget, _ROUNDS)
