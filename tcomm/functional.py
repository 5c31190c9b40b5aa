"""Collectives that have a gradient: `tcomm.functional.all_reduce(x, group)` and its kin.

See `tcomm.groups.compiled.functional`, where each says what its gradient is.
"""

from tcomm.groups.compiled.functional import (
    all_gather,
    all_reduce,
    all_to_all,
    broadcast,
    copy_to_group,
    reduce_from_group,
    reduce_scatter,
)

__all__ = [
    "all_gather",
    "all_reduce",
    "all_to_all",
    "broadcast",
    "copy_to_group",
    "reduce_from_group",
    "reduce_scatter",
]
