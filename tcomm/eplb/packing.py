"""Items into bins of equal size, the heaviest item first, for many rows at once."""

from __future__ import annotations

import numpy as np

from tcomm.eplb.shapes import FloatArray, IntArray

__all__ = ["pack"]


def pack(weights: FloatArray, num_bins: int) -> tuple[IntArray, IntArray]:
    """Put each item, by decreasing weight, into the lightest bin that is not full.

    Of equal weights the first item comes first; of equal bins the lowest is taken. Where there are as many
    bins as items, item i goes into bin i.

    Args:
        weights: [rows, items], 0 or more; rows are packed each for itself.
        num_bins: bins of a row; divides items.

    Returns:
        Bin and position in it of each item, both [rows, items].
    """
    num_rows, num_items = weights.shape
    capacity = num_items // num_bins
    if capacity == 1:
        bins = np.broadcast_to(np.arange(num_items), weights.shape)
        return bins, np.zeros_like(bins)
    order = np.argsort(-weights, axis=1, kind="stable")
    falling = np.ascontiguousarray(np.take_along_axis(weights, order, axis=1).T)
    load = np.zeros((num_rows, num_bins))
    flat_load, flat_count = load.reshape(-1), np.zeros(num_rows * num_bins, np.int64)
    row_starts = np.arange(num_rows) * num_bins
    chosen, positions = np.empty((2, num_items, num_rows), np.int64)
    first = 0
    if (falling[num_bins - 1] > 0).all():
        # While there is an empty bin it is the lightest.
        chosen[:num_bins], positions[:num_bins] = np.arange(num_bins)[:, None] + row_starts, 0
        load[:], flat_count[:] = falling[:num_bins].T, 1
        first = num_bins
    # A step for each item, all rows in it: the few calls of a step are what this costs.
    for item in range(first, num_items):
        where, position = chosen[item], positions[item]
        load.argmin(axis=1, out=where)
        where += row_starts
        flat_count.take(where, out=position, mode="clip")
        flat_count[where] = position + 1
        heavier = flat_load[where]
        heavier += falling[item]
        heavier[position == capacity - 1] = np.inf
        flat_load[where] = heavier
    bins_of, positions_of = np.empty((2, num_rows, num_items), np.int64)
    np.put_along_axis(bins_of, order, (chosen - row_starts).T, axis=1)
    np.put_along_axis(positions_of, order, positions.T, axis=1)
    return bins_of, positions_of
