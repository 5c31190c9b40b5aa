"""A sum of small tensors on the host that has the same bits on every rank."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from tcomm.config import resolve_timeout
from tcomm.groups.arguments import Timeout, check_tensor, is_plain
from tcomm.groups.stateless.rows import comm_error

__all__ = ["cpu_all_reduce_"]

_FIRST_TAG = 27100


def cpu_all_reduce_(
    tensor: torch.Tensor, group: dist.ProcessGroup, timeout: Timeout | datetime.timedelta = None
) -> torch.Tensor:
    """Add `tensor` up over the ranks, in place and in one order on all of them. **Collective.**

    Pairs inside blocks of the largest power of two that divides the number of ranks, doubling the distance;
    then the sums of the blocks, in the order of the blocks. Works on groups that torch does not know.

    Args:
        tensor: dense. One that is not on the CPU goes to `dist.all_reduce`, whose order is its own.
        group: with a backend for the CPU.
        timeout: for all of it: seconds, a profile, a timedelta, or None, which is 120 s.

    Returns:
        `tensor`.

    Raises:
        ConfigError: when the tensor or the timeout is wrong. Nothing was sent.
        PeerTimeoutError: when a rank did not come in time; says "Timed out", and whom it waited for.
        PeerLostError: when a rank is gone.
    """
    check_tensor("cpu_all_reduce_", tensor)
    if isinstance(timeout, datetime.timedelta):
        timeout = timeout.total_seconds()
    seconds = resolve_timeout("default" if timeout is None else timeout) or _NO_LIMIT_SECONDS
    if group.size() == 1 or not tensor.numel():
        return tensor
    if tensor.device.type != "cpu":
        dist.all_reduce(tensor, group=group)
        return tensor
    if not is_plain(tensor):
        # Gloo would take the memory for the values.
        return tensor.copy_(cpu_all_reduce_(tensor.resolve_conj().resolve_neg().contiguous(), group, seconds))
    exchange = _PairExchange(group, seconds)
    block, rank = group.size() & -group.size(), group.rank()
    distance = 1
    while distance < block:
        (theirs,) = exchange(tensor, [rank ^ distance])
        tensor += theirs
        distance *= 2
    if block < group.size():
        mates = [rank % block + first for first in range(0, group.size(), block)]
        others = [mate for mate in mates if mate != rank]
        sums = dict(zip(others, exchange(tensor, others), strict=True)) | {rank: tensor.clone()}
        tensor.copy_(sums[mates[0]])
        for mate in mates[1:]:
            tensor += sums[mate]
    return tensor


_NO_LIMIT_SECONDS = 365.0 * 86400


class _PairExchange:
    """Trades equal tensors with some peers at once; each round under a tag of its own."""

    def __init__(self, group: dist.ProcessGroup, seconds: float) -> None:
        self._group = group
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._tag = _FIRST_TAG

    def __call__(self, tensor: torch.Tensor, peers: Sequence[int]) -> list[torch.Tensor]:
        """What the peers gave, in their order."""
        tag, self._tag = self._tag, self._tag + 1
        received = [torch.empty_like(tensor) for _ in peers]
        pending = [
            (peer, self._group.recv([into], peer, tag)) for peer, into in zip(peers, received, strict=True)
        ]
        pending += [(peer, self._group.send([tensor], peer, tag)) for peer in peers]
        for peer, work in pending:
            left = max(self._deadline - time.monotonic(), 0.001)
            try:
                work.wait(datetime.timedelta(seconds=left))
            except RuntimeError as error:
                raise comm_error(error, "cpu_all_reduce_", self._group, self._seconds, (peer,)) from error
        return received
