"""The choice of an algorithm: a pure function of what all ranks know, and its reasons."""

from __future__ import annotations

import dataclasses

import torch

from tcomm.algorithms import ALGORITHMS, FAMILIES, REDUCING, Algorithm, reduce_op_name
from tcomm.errors import CapabilityError, ConfigError
from tcomm.tuning.table import Row, Table

__all__ = ["Capabilities", "Decision", "Request", "asked_of", "choose", "make_request"]

ENGINES = ("cpu", "triton", "torch")


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What the whole group can do. A reason is empty where nothing is in the way."""

    no_shared_memory: str = ""
    """Why the ranks share no symmetric memory."""
    no_kernels: str = ""
    """Why kernels cannot run on the group's tensors."""
    torch_backends: tuple[tuple[str, str], ...] = ()
    """(device, backend) of the process group behind this one."""

    def backend(self, device: str) -> str:
        """The torch.distributed backend for a device; empty where there is none."""
        return dict(self.torch_backends).get(device, "")


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for, in terms that are the same on every rank."""

    op: str
    """The verb."""
    reduce: str
    """Reduce operation; empty where nothing is reduced."""
    dtype: torch.dtype
    """Element type."""
    nbytes: int
    """Bytes as nccl-tests counts them: of a rank's message, or of the whole where ranks hold parts of it."""
    world_size: int
    """Number of ranks."""
    device: str = "cpu"
    """Device type of the tensors."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """The algorithm for a request, and why not the others. What the communicator itself goes by."""

    request: Request
    """What was asked for."""
    algorithm: str
    """`engine:algorithm` that is used."""
    reason: str
    """Why this one."""
    rejected: tuple[tuple[str, str], ...]
    """Every other algorithm, and why not that."""
    piece_nbytes: int = 0
    """Bytes handled at once; 0: as many as fit."""
    measured_us: tuple[tuple[str, float], ...] = ()
    """The measurement behind the choice: algorithm and median microseconds."""

    @property
    def engine(self) -> str:
        """`cpu`, `triton`, `torch` or `local`."""
        return self.algorithm.partition(":")[0]

    def __str__(self) -> str:
        """A few lines for people."""
        asked = self.request
        what = " ".join(w for w in (asked.op, asked.reduce, str(asked.dtype).removeprefix("torch.")) if w)
        lines = [
            f"{what}, {asked.nbytes} bytes on {asked.world_size} ranks ({asked.device}): {self.algorithm}",
            f"  because {self.reason}",
        ]
        lines += [f"  not {name}: {why}" for name, why in self.rejected]
        return "\n".join(lines)


def make_request(
    verb: str, op: object, dtype: torch.dtype, nbytes: int, world_size: int, device: str = "cpu"
) -> Request:
    """The request that a call of `verb` comes to; `op` counts only where the verb reduces.

    Raises:
        ConfigError: when the verb or the operation is unknown, or nbytes negative.
    """
    if verb not in FAMILIES:
        raise ConfigError(f"{verb!r} is not among {', '.join(FAMILIES)}")
    if nbytes < 0:
        raise ConfigError(f"nbytes={nbytes} is negative")
    reduce = reduce_op_name(op) if FAMILIES[verb] in REDUCING else ""
    return Request(verb, reduce, dtype, nbytes, world_size, device)


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
    refusals = {a.name: _refusal(a, request, capabilities) for a in _candidates(request)}
    fallback = f"torch:{capabilities.backend(request.device) or 'none'}"
    refusals[fallback] = (
        ""
        if capabilities.backend(request.device)
        else f"there is no torch.distributed process group for {request.device} tensors behind this group"
    )
    wanted = [name for name in refusals if _matches(name, forced, request.device)]
    possible = [name for name in wanted if not refusals[name]]
    if not possible:
        raise CapabilityError(_nothing(request, forced, wanted, refusals))
    engine = possible[0].partition(":")[0]
    row = table.pick(FAMILIES[request.op], engine, request.world_size, request.nbytes)
    if row is not None and row.algorithm in possible:
        chosen, reason = row.algorithm, f"the table says so up to {_bound(row)} bytes ({row.measured_at})"
    else:
        chosen, reason = possible[0], "no row of the table covers it and it is the first that can"
    if forced:
        reason = f"{forced!r} was asked for by name" + ("" if len(possible) == 1 else f"; {reason}")
    elif engine == "torch":
        reason = "; ".join(dict.fromkeys(why for why in refusals.values() if why)) or "nothing else does it"
    return Decision(
        request,
        chosen,
        reason,
        tuple((n, _why_not(n, refusals[n], forced, request.device, row)) for n in refusals if n != chosen),
        row.piece_nbytes if row is not None and row.algorithm == chosen else 0,
        tuple(row.measured_us.items()) if row is not None and row.algorithm == chosen else (),
    )


def asked_of(verb: str, algorithm: str) -> str:
    """`algorithm`, which is asked of every verb; empty where only verbs of other families have it."""

    def has(family: str) -> bool:
        return any(algorithm in (a.name, a.name.partition(":")[2]) for a in ALGORITHMS[family])

    mine = FAMILIES[verb]
    return algorithm if has(mine) or not any(has(family) for family in ALGORITHMS) else ""


def _candidates(request: Request) -> tuple[Algorithm, ...]:
    return ALGORITHMS[FAMILIES[request.op]]


def _refusal(algorithm: Algorithm, request: Request, capabilities: Capabilities) -> str:
    """Why `algorithm` cannot do it; empty when it can."""
    if request.device != "cpu":
        return f"there is no symmetric memory for {request.device} tensors in this version"
    if capabilities.no_shared_memory:
        return capabilities.no_shared_memory
    if algorithm.engine == "triton" and capabilities.no_kernels:
        return capabilities.no_kernels
    return algorithm.refusal(request.reduce, request.dtype)


def _matches(name: str, forced: str, device: str) -> bool:
    """Whether `name` is among what is forced; kernels on host memory only when they are asked for."""
    engine, _, algorithm = name.partition(":")
    if not forced:
        return engine != "triton" or device != "cpu"
    if forced in ENGINES or ":" in forced:
        return forced in (engine, name)
    return algorithm == forced and (engine != "triton" or device != "cpu")


def _nothing(request: Request, forced: str, wanted: list[str], refusals: dict[str, str]) -> str:
    what = f"{request.op} {request.reduce} of {request.dtype}".replace("  ", " ")
    if not wanted:
        known = ", ".join([*ENGINES, *refusals])
        return f"algorithm {forced!r} is not known for {request.op}; give one of {known}"
    reasons = "; ".join(f"{name}: {refusals[name]}" for name in wanted)
    asked = f"{forced!r}, which was asked for, cannot do" if forced else "nothing here can do"
    return f"{asked} {what} ({reasons})"


def _why_not(name: str, refusal: str, forced: str, device: str, row: Row | None) -> str:
    if refusal:
        return refusal
    if not _matches(name, forced, device):
        if forced:
            return f"{forced!r} was asked for"
        return "interpreted kernels are for proof, not for speed; ask for them by name"
    times = row.measured_us if row is not None else {}
    if row is not None and name in times and row.algorithm in times:
        return f"{times[name]:g} us where {row.algorithm} took {times[row.algorithm]:g} us"
    return "the table prefers another" if row is not None else "another was the first that can"


def _bound(row: Row) -> str:
    return "any number of" if row.max_nbytes is None else str(row.max_nbytes)
