"""What is asked for, and what is decided: values that ranks compare, print and send."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from tcomm.algorithms import DIRECT_ALGORITHMS, FAMILIES, REDUCING, reduce_op_name
from tcomm.errors import ConfigError

__all__ = ["Decision", "Request", "decode_decisions", "encode_decisions", "is_direct", "make_request"]


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
    deterministic: bool = False
    """Whether results must have the same bits at every call, whatever the switch does."""
    symmetric: bool = False
    """Whether the result is wanted in a symmetric tensor, the same on every rank."""


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
    predicted_us: tuple[tuple[str, float], ...] = ()
    """Where nothing was measured: what the model says of everything that could be used."""

    @property
    def engine(self) -> str:
        """`cpu`, `triton`, `torch` or `local`."""
        return self.algorithm.partition(":")[0]

    @property
    def is_direct(self) -> bool:
        """Whether peers write to the result itself."""
        return is_direct(self.request.op, self.algorithm)

    @property
    def microseconds(self) -> float | None:
        """Of the algorithm that is used, measured or else predicted; None where neither is known."""
        return dict(self.measured_us or self.predicted_us).get(self.algorithm)

    def __str__(self) -> str:
        """A few lines for people."""
        asked = self.request
        what = " ".join(w for w in (asked.op, asked.reduce, str(asked.dtype).removeprefix("torch.")) if w)
        where = asked.device + (", deterministic" if asked.deterministic else "")
        where += ", into a symmetric tensor" if asked.symmetric else ""
        lines = [
            f"{what}, {asked.nbytes} bytes on {asked.world_size} ranks ({where}): {self.algorithm}",
            f"  because {self.reason}",
        ]
        lines += [f"  not {name}: {why}" for name, why in self.rejected]
        return "\n".join(lines)


def is_direct(verb: str, algorithm: str) -> bool:
    """Whether `algorithm`, with its engine or without, is one of `verb` that writes to peers' results."""
    known = DIRECT_ALGORITHMS.get(FAMILIES[verb], ())
    return any(algorithm in (a.name, a.name.partition(":")[2]) for a in known)


def make_request(
    verb: str,
    op: object,
    dtype: torch.dtype,
    nbytes: int,
    world_size: int,
    device: str = "cpu",
    deterministic: bool = False,
    symmetric: bool = False,
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
    return Request(verb, reduce, dtype, nbytes, world_size, device, deterministic, symmetric)


def encode_decisions(decisions: Sequence[Decision], indent: int = 1) -> bytes:
    """JSON of decisions, complete: `decode_decisions` gives equal ones back."""
    return msgspec.json.format(msgspec.json.encode(decisions, enc_hook=_plain), indent=indent)


def decode_decisions(data: bytes) -> list[Decision]:
    """The decisions in JSON.

    Raises:
        ConfigError: when it is none of `encode_decisions`; names the field.
    """
    try:
        return msgspec.json.decode(data, type=list[Decision], dec_hook=_from_plain)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"these are no decisions: {error}") from error


def _plain(value: object) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    raise NotImplementedError(f"{type(value)} in a decision")


def _from_plain(kind: type, value: Any) -> torch.dtype:
    dtype = getattr(torch, value, None) if kind is torch.dtype else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{value!r} is no dtype of torch")
    return dtype
