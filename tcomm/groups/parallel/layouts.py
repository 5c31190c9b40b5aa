"""Which ranks form which group. Pure functions of the sizes."""

from __future__ import annotations

import operator
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from tcomm.errors import ConfigError

__all__ = ["ContextOrder", "Layout", "Rows", "inner_dp_rows", "make_layout"]

Rows = list[list[int]]
"""The groups of one kind: one list of global ranks for each. The order of both is part of the contract."""

ContextOrder = Literal["newest", "0.14"]
"""How decode context parallel groups are laid: across prefill context parallel ranks first, or along TP."""


class Layout(msgspec.Struct, frozen=True):
    """The groups of every kind; each rank is in exactly one row of each, but for `engram_dp`.

    Rows of one kind are made in the order in which they stand.
    """

    tp: Rows
    """Tensor parallel: neighbours."""
    dcp: Rows
    """Decode context parallel: inside a block of PCP x TP ranks."""
    pcp: Rows
    """Prefill context parallel."""
    pp: Rows
    """Pipeline stages, first to last."""
    dp: Rows
    """Data parallel replicas."""
    ep: Rows
    """Expert parallel: every DP, PCP and TP rank of one pipeline stage."""
    eplb: Rows
    """Expert load balancing: as `ep`, in a group of its own."""
    etp: Rows
    """Engram tensor parallel: as `tp`, unless another size is given."""
    engram_dp: Rows
    """Engram data parallel; empty where its size is 1 or not given."""
    inner_dp: Rows
    """All ranks of one data parallel replica; all ranks, where there is one replica."""


def make_layout(
    world_size: int,
    *,
    tp: int = 1,
    pp: int = 1,
    pcp: int = 1,
    dcp: int | None = 1,
    dp: int = 1,
    etp: int | None = None,
    engram_dp: int | None = None,
    context_order: ContextOrder = "newest",
) -> Layout:
    """Lay `world_size` ranks out: TP varies fastest, then PCP, PP, DP; the rest are independent copies.

    Args:
        world_size: number of ranks, a multiple of dp x pp x pcp x tp.
        tp: tensor parallel size.
        pp: pipeline stages.
        pcp: prefill context parallel size.
        dcp: decode context parallel size; None is 1.
        dp: data parallel size.
        etp: engram tensor parallel size, a divisor of dp x tp; None is tp.
        engram_dp: engram data parallel size, a divisor of dp; None is 1.
        context_order: of the decode context parallel groups.

    Raises:
        ConfigError: when a size is no positive integer, or the sizes do not fit one another or the world.
    """
    sizes = {"data": dp, "pipeline": pp, "prefill context": pcp, "tensor": tp}
    for name, size in {"world": world_size, **sizes}.items():
        _check_size(f"{name} parallel" if name in sizes else name, size)
    product = dp * pp * pcp * tp
    if world_size % product:
        asked = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise ConfigError(
            f"a world of {world_size} ranks is no multiple of {product} = {asked} parallel; give sizes whose "
            f"product is one of {', '.join(map(str, _divisors(world_size)))}, or {product} ranks"
        )
    dcp = _check_context(1 if dcp is None else dcp, tp, pcp, context_order)
    ranks = np.arange(world_size).reshape(-1, dp, pp, pcp, tp)
    experts = _rows(ranks.swapaxes(1, 2), dp * pcp * tp)
    return Layout(
        tp=_rows(ranks, tp),
        dcp=_rows(ranks.swapaxes(3, 4) if dcp > 1 and context_order == "newest" else ranks, dcp),
        pcp=_rows(ranks.swapaxes(3, 4), pcp),
        pp=_rows(ranks.swapaxes(2, 4), pp),
        dp=_rows(ranks.swapaxes(1, 4), dp),
        ep=experts,
        eplb=[list(row) for row in experts],
        etp=_engram_tensor_rows(ranks, etp),
        engram_dp=_engram_data_rows(ranks, engram_dp),
        inner_dp=inner_dp_rows(world_size, product // dp, dp),
    )


def inner_dp_rows(world_size: int, replica_size: int, dp: int) -> Rows:
    """The ranks of each data parallel replica: blocks of `replica_size`, or the world where dp is 1.

    Raises:
        ConfigError: when a size is no positive integer, or the world is no multiple of the replica.
    """
    for name, size in (("world", world_size), ("replica", replica_size), ("data parallel", dp)):
        _check_size(name, size)
    if world_size % replica_size:
        raise ConfigError(
            f"a world of {world_size} ranks is no multiple of a replica of {replica_size}; "
            f"give one of {', '.join(map(str, _divisors(world_size)))}"
        )
    return _rows(np.arange(world_size), replica_size if dp > 1 else world_size)


def _rows(ranks: npt.NDArray[np.int_], size: int) -> Rows:
    rows: Rows = ranks.reshape(-1, size).tolist()
    return rows


def _engram_tensor_rows(ranks: npt.NDArray[np.int_], size: int | None) -> Rows:
    _, dp, _, _, tp = ranks.shape
    if size is None or _check_size("engram tensor parallel", size) == tp:
        return _rows(ranks, tp)
    if dp * tp % size:
        raise ConfigError(
            f"an engram tensor parallel size of {size} does not divide data {dp} x tensor {tp} parallel; "
            f"give one of {', '.join(map(str, _divisors(dp * tp)))}"
        )
    return _rows(ranks.transpose(0, 2, 3, 1, 4), size)


def _engram_data_rows(ranks: npt.NDArray[np.int_], size: int | None) -> Rows:
    dp = ranks.shape[1]
    if size is None or _check_size("engram data parallel", size) == 1:
        return []
    if dp % size:
        raise ConfigError(
            f"an engram data parallel size of {size} does not divide a data parallel size of {dp}; "
            f"give one of {', '.join(map(str, _divisors(dp)))}"
        )
    # At full size it is the data parallel group itself, in that one's order.
    return _rows(ranks.swapaxes(1, 4) if size == dp else ranks.transpose(0, 2, 3, 4, 1), size)


def _check_context(dcp: int, tp: int, pcp: int, order: str) -> int:
    if order not in {"newest", "0.14"}:
        raise ConfigError(f"context_order={order!r} is neither 'newest' nor '0.14'")
    _check_size("decode context parallel", dcp)
    along_tensor = _divisors(tp)
    fitting = {1, pcp, tp * pcp} if pcp > 1 else set(along_tensor)
    if order == "0.14":
        fitting = {*along_tensor, tp * pcp}
    if dcp not in fitting:
        raise ConfigError(
            f"a decode context parallel size of {dcp} does not fit tensor {tp} and prefill context {pcp} "
            f"parallel; give one of {', '.join(map(str, sorted(fitting)))}"
        )
    return dcp


def _check_size(name: str, size: object) -> int:
    try:
        count = 0 if isinstance(size, bool) else operator.index(size)  # type: ignore[arg-type]
    except TypeError:
        count = 0
    if count < 1:
        article = "an" if name[0] == "e" else "a"
        raise ConfigError(f"{article} {name} size of {size!r} is no positive integer; give 1 or more")
    return count


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
