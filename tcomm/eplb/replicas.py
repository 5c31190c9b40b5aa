"""How many replicas each expert gets, for many rows at once."""

from __future__ import annotations

import numpy as np

from tcomm.eplb.shapes import FloatArray, IntArray

__all__ = ["replicate"]


def replicate(weights: FloatArray, num_slots: int) -> tuple[IntArray, IntArray, IntArray]:
    """Give every expert a replica, then each further one to the expert with the most load for a replica.

    No other counts have a lower heaviest replica. Of equal experts the first is taken.

    Args:
        weights: [rows, experts]; rows are treated each for itself.
        num_slots: replicas of a row, as many as experts or more.

    Returns:
        Expert of each replica and its number among that expert's replicas, both [rows, num_slots], the first
        replicas first, in the order of experts; and replicas of each expert, [rows, experts].
    """
    num_rows, num_experts = weights.shape
    experts = np.empty((num_rows, num_slots), np.int64)
    experts[:, :num_experts] = np.arange(num_experts)
    numbers = np.zeros((num_rows, num_slots), np.int64)
    counts = np.ones((num_rows, num_experts), np.int64)
    share = weights.astype(np.float64)
    flat_share, flat_counts, flat_weights = share.reshape(-1), counts.reshape(-1), weights.reshape(-1)
    row_starts = np.arange(num_rows) * num_experts
    for slot in range(num_experts, num_slots):
        heaviest = share.argmax(axis=1)
        experts[:, slot] = heaviest
        heaviest += row_starts
        count = flat_counts[heaviest]
        numbers[:, slot] = count
        count += 1
        flat_counts[heaviest] = count
        flat_share[heaviest] = flat_weights[heaviest] / count
    return experts, numbers, counts
