"""`tcomm explain`: what a group would do, asked of the function that the communicator itself asks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from tcomm.cli.cases import VERBS
from tcomm.config import Config
from tcomm.errors import ConfigError
from tcomm.presets import named_topology
from tcomm.tuning.choose import Capabilities, Decision, decide, make_request
from tcomm.tuning.table import load_table

__all__ = ["EXPLAIN_HEADER", "Question", "answers", "explain_columns", "title_of"]

EXPLAIN_HEADER = ("bytes", "algorithm", "us", "from", "reason")

_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


@dataclasses.dataclass(frozen=True)
class Question:
    """What somebody wants to know."""

    op: str
    """The verb, by the communicator's name or nccl-tests'."""
    sizes: tuple[int, ...]
    """Bytes as nccl-tests counts them."""
    topology: str = ""
    """Name of one; empty: processes of this machine."""
    ranks: int = 0
    """How many; 0: as many as the topology has, or 2."""
    dtype: str = "float32"
    """Element type as torch spells it."""
    reduce: str = "sum"
    """Reduce operation."""
    algorithm: str = ""
    """Engine, algorithm or both that must be used."""
    deterministic: bool = False
    """Whether nothing may add in an order of its own."""
    symmetric: bool = False
    """Whether the result is wanted in a symmetric tensor."""


def answers(question: Question, config: Config) -> list[Decision]:
    """The decision for every size.

    Raises:
        CapabilityError: when the collective would raise it.
        ConfigError: when the question makes no sense.
    """
    dtype = getattr(torch, question.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"{question.dtype!r} is no dtype of torch")
    capabilities, device = Capabilities(torch_backends=(("cpu", "gloo"),)), "cpu"
    ranks = question.ranks or 2
    if question.topology:
        topology, device = named_topology(question.topology), "cuda"
        ranks = question.ranks or topology.world_size
        if ranks != topology.world_size:
            raise ConfigError(
                f"--ranks {ranks} contradicts --topology {question.topology}, which has "
                f"{topology.world_size} ranks; leave --ranks out, or give another topology"
            )
        capabilities = Capabilities(torch_backends=(("cpu", "gloo"), ("cuda", "nccl")), topology=topology)
    table, verb = load_table(config.table), VERBS.get(question.op, question.op)
    deterministic = question.deterministic or config.deterministic
    requests = [
        make_request(verb, question.reduce, dtype, size, ranks, device, deterministic, question.symmetric)
        for size in question.sizes
    ]
    return [
        decide(request, capabilities, table, question.algorithm, config.algorithm) for request in requests
    ]


def title_of(question: Question, decision: Decision) -> str:
    """What was asked, in a line."""
    asked = decision.request
    words = (asked.op, asked.reduce, str(asked.dtype).removeprefix("torch."), "on", question.topology)
    told = " ".join(word for word in words if word) + f", {asked.world_size} ranks"
    told += ", deterministic" if asked.deterministic else ""
    return told + (", into a symmetric tensor" if asked.symmetric else "")


def explain_columns(decisions: Sequence[Decision]) -> list[list[str]]:
    """A row of text for each decision, under `EXPLAIN_HEADER`."""
    return [
        [
            _size(decision.request.nbytes),
            decision.algorithm,
            "-" if decision.microseconds is None else f"{decision.microseconds:.1f}",
            _origin(decision),
            decision.reason,
        ]
        for decision in decisions
    ]


def _origin(decision: Decision) -> str:
    if decision.microseconds is None:
        return "-"
    return "measured" if decision.measured_us else "model"


def _size(nbytes: int) -> str:
    for unit, name in _UNITS:
        if nbytes and nbytes % unit == 0:
            return f"{nbytes // unit} {name}"
    return str(nbytes)
