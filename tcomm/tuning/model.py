"""How long a call would take on GPUs where nobody has measured it: a model, to choose by until somebody has.

    t = start + bytes on the wire / (0.8 link) + bytes on the network / (0.8 nic) + local copies

Every term is data below. The starts of the all-reduces are fitted to what torch's, vLLM's and NCCL's kernels
take on H100 in CUDA graphs: 3.5 us with flags in the data, 4.5 us one-shot, 6.5 us two-shot and through the
switch; kernels reach 80 % of a link. A pull costs a round trip more than a push. NCCL's times are those that
others measured, for links where there are any: vLLM #42324 and #37756, helion #245, Megatron-LM #5596.

Only + - * / of numbers that all ranks agreed on: the same result, to the bit, on every rank.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from tcomm.algorithms import FAMILIES
from tcomm.topology import Topology, sm_of
from tcomm.tuning.decision import Request

__all__ = ["predict_us"]

_BYTES_PER_US = 1e3
_ACHIEVED = 0.8
_UNKNOWN_LINK_GBPS = 32.0
_UNKNOWN_NIC_GBPS = 25.0
_MIB = 1 << 20
_CACHED_BYTES = _MIB
"""So much of a message is copied inside the caches, in the time that every start has room for."""
_COPY_GBPS = ((100, 875.0), (90, 1340.0), (80, 800.0), (0, 360.0))
"""GB/s copied inside a device, from an architecture on: what long all-reduces through the switch, with two
copies, take beyond their time on the wire (vLLM #37756 on B300, #42324 on H100); older: guessed."""

_Share = tuple[float, float, float]
"""Multiples of the message: a + b * W + c / W for W ranks."""
_NONE: _Share = (0, 0, 0)
_WHOLE: _Share = (1, 0, 0)
_TO_EACH: _Share = (-1, 1, 0)
_OTHERS: _Share = (1, 0, -1)
_PART: _Share = (0, 0, 1)


@dataclasses.dataclass(frozen=True)
class _Cost:
    """What one algorithm costs inside a node."""

    start_us: float
    """Without any data, in a CUDA graph."""
    wire: _Share = _NONE
    """Bytes over the busiest rank's link, in its busier direction."""
    copied: _Share = _NONE
    """Bytes that a rank copies between its input, its staging and its result."""


_COSTS = {
    "all_reduce": {
        "one_shot_ll": _Cost(3.5, (-2, 2, 0), (0, 2, 0)),
        "one_shot_push": _Cost(4.5, _TO_EACH, (0, 1, 0)),
        "one_shot_pull": _Cost(5.5, _TO_EACH, _WHOLE),
        "two_shot": _Cost(6.5, (2, 0, -2), (1, 0, 1)),
        # The switch asks every GPU for its data once for each rank that reduces all of it.
        "multimem_one_shot": _Cost(6.5, (0, 1, 0), _WHOLE),
        "multimem_two_shot": _Cost(6.5, (1, 0, 1), (2, 0, 0)),
    },
    "reduce_scatter": {
        "push": _Cost(4.5, _OTHERS, _WHOLE),
        "pull": _Cost(5.5, _OTHERS, _WHOLE),
        "multimem": _Cost(6.5, _WHOLE, _WHOLE),
    },
    "all_gather": {
        "push": _Cost(4.5, _OTHERS, _WHOLE),
        "pull": _Cost(5.5, _OTHERS, _PART),
        "multimem": _Cost(6.5, _OTHERS, _WHOLE),
    },
    "reduce": {"push": _Cost(4.5, _TO_EACH, (0, 1, 0)), "pull": _Cost(5.5, _TO_EACH, _WHOLE)},
    "broadcast": {"push": _Cost(4.5, _TO_EACH, _WHOLE), "pull": _Cost(5.5, _TO_EACH, _WHOLE)},
    "gather": {"push": _Cost(4.5, _OTHERS, _WHOLE), "pull": _Cost(5.5, _OTHERS, _PART)},
    "scatter": {"push": _Cost(4.5, _OTHERS, _PART), "pull": _Cost(5.5, _OTHERS, _WHOLE)},
    "all_to_all": {"push": _Cost(4.5, _OTHERS, _WHOLE), "pull": _Cost(5.5, _OTHERS, _WHOLE)},
    "barrier": {"arrival": _Cost(3.5)},
    "point_to_point": {"mailbox": _Cost(4.5, _WHOLE, _WHOLE)},
}
"""By family and algorithm. Bytes as nccl-tests counts them."""

_NETWORK_US = 8.0
"""What a step between nodes adds. Assumed: nobody has published or measured it for these kernels."""

_NCCL_START_US = 20.0
_NCCL_NETWORK_START_US = 40.0
_NCCL_WIRE = {
    "all_reduce": (2.0, 0.0, -2.0),
    "reduce": _WHOLE,
    "broadcast": _WHOLE,
    "point_to_point": _WHOLE,
    "barrier": _NONE,
}

_Curve = tuple[tuple[float, float], ...]
_GATHER_ON_H100: _Curve = ((0, 18), (2, 20.2), (8, 43.4), (32, 119), (128, 385))
_REDUCE_ON_H100: _Curve = (
    *((0, 21.4), (0.5, 24), (1, 25), (2, 37), (4, 50)),
    *((8, 76), (16, 121), (32, 195), (64, 316), (128, 561)),
)
_NCCL_MEASURED: dict[tuple[str, str], tuple[int, _Curve]] = {
    ("all_reduce", "nvlink4"): (8, _REDUCE_ON_H100),
    ("all_reduce", "nvlink5"): (6, ((0, 27), (1, 27), (4, 46), (32, 141), (128, 393))),
    ("all_gather", "nvlink4"): (8, _GATHER_ON_H100),
    ("reduce_scatter", "nvlink4"): (8, _GATHER_ON_H100),
}
"""Ranks, and (MiB, microseconds) of the message, by family and link."""


def predict_us(algorithm: str, request: Request, topology: Topology) -> float | None:
    """Microseconds of `request` by `algorithm`, to the thousandth.

    Args:
        algorithm: `engine:algorithm`, or `torch:nccl`.
        request: what is asked for.
        topology: of the group, with as many ranks as the request.

    Returns:
        None where the model knows nothing of that algorithm.
    """
    engine, _, name = algorithm.partition(":")
    family = FAMILIES[request.op]
    if algorithm == "torch:nccl":
        return round(_nccl_us(family, request, topology), 3)
    if name == "hierarchical":
        return round(_hierarchical_us(family, request.nbytes, topology), 3)
    cost = _COSTS[family].get(name)
    if engine != "triton" or cost is None:
        return None
    wire = _of(cost.wire, request.nbytes, request.world_size) / _link_rate(topology)
    copied = _of(cost.copied, max(0, request.nbytes - _CACHED_BYTES), request.world_size)
    return round(cost.start_us + wire + copied / _copy_rate(topology), 3)


def _of(share: _Share, nbytes: int, ranks: int) -> float:
    fixed, per_rank, over_ranks = share
    return nbytes * (fixed + per_rank * ranks + over_ranks / ranks)


def _link_rate(topology: Topology) -> float:
    """Bytes a microsecond that kernels move over a rank's links."""
    return _ACHIEVED * (topology.link_gbps or _UNKNOWN_LINK_GBPS) * _BYTES_PER_US


def _nic_rate(topology: Topology) -> float:
    return _ACHIEVED * (topology.nic_gbps or _UNKNOWN_NIC_GBPS) * _BYTES_PER_US


def _copy_rate(topology: Topology) -> float:
    """Bytes a microsecond of a copy in device memory."""
    sm = sm_of(topology.arch)
    return next(rate for oldest, rate in _COPY_GBPS if sm >= oldest) * _BYTES_PER_US


def _hierarchical_us(family: str, nbytes: int, topology: Topology) -> float:
    """Inside the nodes, then between ranks of the same place in theirs, then inside the nodes again."""
    local, nodes = topology.ranks_per_node, topology.num_nodes
    inside = _of(_OTHERS, nbytes, local) / _link_rate(topology)
    copied = max(0, nbytes - _CACHED_BYTES) / _copy_rate(topology)
    if family == "all_reduce":
        between = nbytes / local * (nodes - 1) / _nic_rate(topology)
        return 6.5 + _NETWORK_US + 2 * inside + between + 2 * copied
    between = nbytes / local * (nodes - 1) / nodes / _nic_rate(topology)
    return 4.5 + _NETWORK_US + inside + between + copied


def _nccl_us(family: str, request: Request, topology: Topology) -> float:
    """NCCL without registered memory: by measurements where there are any, else by its bytes on the wire."""
    share = _NCCL_WIRE.get(family, _OTHERS)
    wire = _of(share, request.nbytes, request.world_size)
    if topology.num_nodes > 1:
        # A ring enters and leaves every node once by each network card, while its other hops go on.
        between = wire / (topology.ranks_per_node or 1) / _nic_rate(topology)
        return _NCCL_NETWORK_START_US + max(wire / _link_rate(topology), between)
    measured = _NCCL_MEASURED.get((family, topology.link))
    if measured is None:
        return _NCCL_START_US + wire / _link_rate(topology)
    ranks, curve = measured
    # What the measured ranks would have to send to put as much on the wire.
    return _along(curve, wire / _of(share, _MIB, ranks))


def _along(curve: Sequence[tuple[float, float]], x: float) -> float:
    """Straight lines through the points of a curve, the last of them going on."""
    segments = list(itertools.pairwise(curve))
    (left, low), (right, high) = next((s for s in segments if x <= s[1][0]), segments[-1])
    return low + (high - low) * (x - left) / (right - left)
