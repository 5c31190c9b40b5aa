"""The choice of an algorithm: a pure function of what all ranks know, and its reasons."""

from __future__ import annotations

import dataclasses

from tcomm.algorithms import (
    ALGORITHMS,
    DIRECT_ALGORITHMS,
    FAMILIES,
    GPU_ALGORITHMS,
    REDUCING,
    Algorithm,
)
from tcomm.errors import CapabilityError
from tcomm.topology import Topology
from tcomm.tuning.decision import Decision, Request, is_direct, make_request
from tcomm.tuning.model import predict_us
from tcomm.tuning.needs import refusal_of_nccl, refusal_on_gpus
from tcomm.tuning.table import Row, Table

__all__ = [
    "IN_SYMMETRIC",
    "Capabilities",
    "Decision",
    "Request",
    "asked_of",
    "choose",
    "decide",
    "is_direct",
    "make_request",
]

ENGINES = ("cpu", "triton", "torch")
_ONLY_ON_GPUS = frozenset(a.name for family in GPU_ALGORITHMS.values() for a in family)
_DIRECT = frozenset(a.name for family in DIRECT_ALGORITHMS.values() for a in family)
IN_SYMMETRIC = "_symmetric"
"""Behind a family in a table: results in symmetric tensors."""


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What the whole group can do. A reason is empty where nothing is in the way."""

    no_shared_memory: str = ""
    """Why the ranks share no symmetric memory on the host."""
    no_kernels: str = ""
    """Why kernels cannot run on the group's tensors in host memory."""
    torch_backends: tuple[tuple[str, str], ...] = ()
    """(device, backend) of the process group behind this one."""
    topology: Topology | None = None
    """The vote on the GPUs; None where there is no symmetric memory on them."""

    def backend(self, device: str) -> str:
        """The torch.distributed backend for a device; empty where there is none."""
        return dict(self.torch_backends).get(device, "")


@dataclasses.dataclass(frozen=True)
class _Pick:
    """An algorithm among those that can, and what speaks for it."""

    algorithm: str
    reason: str
    row: Row | None = None
    """Of the table, when one covers the call."""
    predicted_us: tuple[tuple[str, float], ...] = ()
    """What the model says of all that can, when it was asked."""

    @property
    def times(self) -> dict[str, float]:
        """Microseconds to compare by."""
        return dict(self.predicted_us) or (self.row.measured_us if self.row is not None else {})


def decide(
    request: Request, capabilities: Capabilities, table: Table, algorithm: str = "", configured: str = ""
) -> Decision:
    """What a communicator does with a call, and what `explain` says that it does.

    Args:
        request: what is asked for.
        capabilities: what the group can do.
        table: measurements.
        algorithm: as the call names it; empty: any.
        configured: as TCOMM_ALGORITHM names it, for calls that name none.

    Raises:
        CapabilityError: when what is forced cannot be used, or nothing can.
    """
    return choose(request, capabilities, table, algorithm or asked_of(request.op, configured))


def choose(request: Request, capabilities: Capabilities, table: Table, forced: str = "") -> Decision:
    """Pick the algorithm for `request`. Pure: the same arguments give the same decision on every rank.

    Args:
        request: what is asked for.
        capabilities: what the group can do.
        table: measurements.
        forced: engine, algorithm or `engine:algorithm` that must be used; empty: any.

    Raises:
        CapabilityError: when what is forced cannot be used, or nothing can.
    """
    if request.world_size == 1:
        return Decision(request, "local:copy", "a world of one has nobody to talk to", ())
    candidates = _candidates(request, capabilities, forced)
    refusals = {a.name: _refusal(a, request, capabilities) for a in candidates}
    fallback = f"torch:{capabilities.backend(request.device) or 'none'}"
    refusals[fallback] = _refusal_of_torch(request, capabilities)
    wanted = [name for name in refusals if _matches(name, forced, request.device)]
    possible = [name for name in wanted if not refusals[name]]
    if not possible:
        raise CapabilityError(_nothing(request, forced, wanted, refusals))
    if possible[-1] == fallback and len(possible) > 1 and _needs_fixed_order(request):
        refusals[possible.pop()] = "it promises no order of adding, and deterministic results were asked for"
    topology = _topology_for(request, capabilities)
    if topology is None:
        pick = _pick_by_table(request, possible, table)
    else:
        pick = _pick_on_gpus(request, possible, table, topology)
    row = pick.row if pick.row is not None and pick.row.algorithm == pick.algorithm else None
    return Decision(
        request,
        pick.algorithm,
        _reason(pick, possible, refusals, forced, topology is not None),
        tuple((n, _why_not(n, refusals[n], forced, request, pick)) for n in refusals if n != pick.algorithm),
        row.piece_nbytes if row is not None else 0,
        tuple(row.measured_us.items()) if row is not None else (),
        pick.predicted_us,
    )


def asked_of(verb: str, algorithm: str) -> str:
    """`algorithm`, which is asked of every verb; empty where only verbs of other families have it."""

    def has(family: str) -> bool:
        known = (*ALGORITHMS[family], *GPU_ALGORITHMS.get(family, ()), *DIRECT_ALGORITHMS.get(family, ()))
        return any(algorithm in (a.name, a.name.partition(":")[2]) for a in known)

    mine = FAMILIES[verb]
    return algorithm if has(mine) or not any(has(family) for family in ALGORITHMS) else ""


def _candidates(request: Request, capabilities: Capabilities, forced: str) -> tuple[Algorithm, ...]:
    """What does such calls; what only GPUs do, only where there are any or when it is named."""
    family = FAMILIES[request.op]
    more = GPU_ALGORITHMS.get(family, ())
    if _topology_for(request, capabilities) is None:
        more = tuple(a for a in more if forced in (a.name, a.name.partition(":")[2]))
    direct: tuple[Algorithm, ...] = DIRECT_ALGORITHMS.get(family, ())
    if not request.symmetric:
        direct = tuple(a for a in direct if forced in (a.name, a.name.partition(":")[2]))
    return (*ALGORITHMS[family], *more, *direct)


def _topology_for(request: Request, capabilities: Capabilities) -> Topology | None:
    """Of the GPUs that the tensors are on; None where they are elsewhere, or without symmetric memory."""
    return capabilities.topology if request.device == "cuda" else None


def _refusal(algorithm: Algorithm, request: Request, capabilities: Capabilities) -> str:
    """Why `algorithm` cannot do it; empty when it can."""
    topology = _topology_for(request, capabilities)
    if topology is not None:
        return refusal_on_gpus(algorithm, request, topology)
    if request.device != "cpu":
        return f"there is no symmetric memory for {request.device} tensors in this version"
    if algorithm.name in _ONLY_ON_GPUS:
        return "its kernels need a GPU: what they are made of has no form on host memory"
    if capabilities.no_shared_memory:
        return capabilities.no_shared_memory
    if algorithm.name in _DIRECT and not request.symmetric:
        return "it writes to the peers' results, and out= is no tensor of symmetric_empty"
    if algorithm.engine == "triton" and capabilities.no_kernels:
        return capabilities.no_kernels
    return algorithm.refusal(request.reduce, request.dtype)


def _refusal_of_torch(request: Request, capabilities: Capabilities) -> str:
    backend = capabilities.backend(request.device)
    if not backend:
        return f"there is no torch.distributed process group for {request.device} tensors behind this group"
    topology = _topology_for(request, capabilities)
    return "" if topology is None or backend != "nccl" else refusal_of_nccl(topology)


def _needs_fixed_order(request: Request) -> bool:
    return request.deterministic and request.device == "cuda" and FAMILIES[request.op] in REDUCING


def _pick_by_table(request: Request, possible: list[str], table: Table) -> _Pick:
    """By what was measured on host memory, else the first that can."""
    engine, family = possible[0].partition(":")[0], FAMILIES[request.op]
    size = request.world_size, request.nbytes
    if request.symmetric:
        row = table.pick(family + IN_SYMMETRIC, engine, *size)
        # Else as everywhere: a rank may be the only one that wants its result in a symmetric tensor.
        if row is not None and row.algorithm in possible and row.algorithm in _DIRECT:
            return _Pick(row.algorithm, _told_by(row), row)
    row = table.pick(family, engine, *size)
    if row is not None and row.algorithm in possible:
        return _Pick(row.algorithm, _told_by(row), row)
    return _Pick(possible[0], "no row of the table covers it and it is the first that can", row)


def _pick_on_gpus(request: Request, possible: list[str], table: Table, topology: Topology) -> _Pick:
    """By what was measured on GPUs of that kind, else by the model."""
    family = FAMILIES[request.op]
    row = table.pick(family, "", request.world_size, request.nbytes, topology.kind)
    if row is not None and row.algorithm in possible:
        return _Pick(row.algorithm, _told_by(row), row)
    measured = {name: row.measured_us[name] for name in possible if name in row.measured_us} if row else {}
    if row is not None and measured:
        best = min(measured, key=measured.__getitem__)
        return _Pick(best, f"the table's {row.algorithm} cannot be used, and it is the next best", row)
    known = {name: predict_us(name, request, topology) for name in possible}
    times = {name: us for name, us in known.items() if us is not None}
    if not times:
        return _Pick(possible[0], "nothing was measured, the model knows none, and it is the first that can")
    best, *others = sorted(times, key=times.__getitem__)
    reason = f"model, not a measurement: {times[best]:.1f} us"
    if others:
        reason += f" against {times[others[0]]:.1f} us of {others[0]}"
    return _Pick(best, reason, None, tuple(times.items()))


def _told_by(row: Row) -> str:
    return f"the table says so up to {_bound(row)} bytes ({row.measured_at})"


def _reason(pick: _Pick, possible: list[str], refusals: dict[str, str], forced: str, on_gpus: bool) -> str:
    if forced:
        return f"{forced!r} was asked for by name" + ("" if len(possible) == 1 else f"; {pick.reason}")
    if pick.algorithm.startswith("torch:") and len(possible) == 1:
        # That host memory is elsewhere explains nothing where kernels could have done it and cannot.
        told = [why for name, why in refusals.items() if why and not (on_gpus and name.startswith("cpu:"))]
        return "; ".join(dict.fromkeys(told)) or "nothing else does it"
    return pick.reason


def _matches(name: str, forced: str, device: str) -> bool:
    """Whether `name` is among what is forced; kernels on host memory only when they are asked for."""
    engine, _, algorithm = name.partition(":")
    if not forced:
        return engine != "triton" or device != "cpu"
    if forced in ENGINES or ":" in forced:
        return forced in (engine, name)
    return algorithm == forced and (engine != "triton" or device != "cpu" or name in _ONLY_ON_GPUS)


def _nothing(request: Request, forced: str, wanted: list[str], refusals: dict[str, str]) -> str:
    what = f"{request.op} {request.reduce} of {request.dtype}".replace("  ", " ")
    if not wanted:
        known = ", ".join([*ENGINES, *refusals])
        return f"algorithm {forced!r} is not known for {request.op}; give one of {known}"
    reasons = "; ".join(f"{name}: {refusals[name]}" for name in wanted)
    asked = f"{forced!r}, which was asked for, cannot do" if forced else "nothing here can do"
    return f"{asked} {what} ({reasons})"


def _why_not(name: str, refusal: str, forced: str, request: Request, pick: _Pick) -> str:
    if refusal:
        return refusal
    if not _matches(name, forced, request.device):
        if forced:
            return f"{forced!r} was asked for"
        return "interpreted kernels are for proof, not for speed; ask for them by name"
    times = pick.times
    if pick.predicted_us:
        theirs = f"{times[name]:.1f} us" if name in times else "it knows nothing of it"
        return f"model: {theirs} against {times[pick.algorithm]:.1f} us of {pick.algorithm}"
    if name in times and pick.algorithm in times:
        return f"{times[name]:g} us where {pick.algorithm} took {times[pick.algorithm]:g} us"
    return "the table prefers another" if pick.row is not None else "another was the first that can"


def _bound(row: Row) -> str:
    return "any number of" if row.max_nbytes is None else str(row.max_nbytes)
