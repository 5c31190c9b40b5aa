"""`tcomm bench moe`: tokens to their experts and back, by every backend and on torch.distributed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from tcomm.cli.bench import _gather, _gather_cores
from tcomm.cli.moe_baselines import DeduplicatedGloo, ExpandedGloo
from tcomm.cli.workers import run_ranks
from tcomm.errors import ConfigError
from tcomm.groups.communicator import Communicator
from tcomm.groups.moe.layers import BACKENDS, Backend, MoeShape, make_backend
from tcomm.tuning.measure import Candidate, Schedule, percentiles, slowest, time_alternating

__all__ = ["MOE_HEADER", "MoeRequest", "check_moe_request", "moe_columns", "run_moe_bench"]

_SETUP_SECONDS = 120.0
_MANY_TOKENS = 1024
_FIXED_CAPACITY = frozenset({"low_latency", "one_sided"})
"""Backends whose memory is for the most that could come."""
_SUMMING_EXPERTS = frozenset({"low_latency", "gloo"})
"""Who weights and sums over experts; the others sum over ranks what these have summed up."""
_TOLERANCE = 2.0**-6
_NUM_INPUTS = 2
_BASELINES: dict[str, Callable[[int], Any]] = {"gloo": ExpandedGloo, "gloo dedup": DeduplicatedGloo}


@dataclasses.dataclass(frozen=True)
class MoeRequest:
    """What to measure."""

    ranks: int = 4
    """Processes on this machine."""
    tokens: tuple[int, ...] = (128, 4096)
    """Of each rank."""
    hidden: int = 7168
    """Elements of a token."""
    top_k: int = 8
    """Experts of a token."""
    num_experts: int = 256
    """Of all ranks."""
    dtype: str = "bfloat16"
    """Of the tokens."""
    backends: tuple[str, ...] = tuple(BACKENDS)
    """Which; those of fixed capacity only where tokens are few."""
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    """How often, where tokens are few."""
    pin: bool = False
    """Give each rank one core."""


def check_moe_request(request: MoeRequest) -> MoeRequest:
    """The request, when it can be carried out.

    Raises:
        ConfigError: when it makes no sense.
    """
    unknown = [name for name in request.backends if name not in BACKENDS]
    if unknown or not request.backends:
        raise ConfigError(f"{', '.join(unknown)!r} is no backend; give {', '.join(BACKENDS)}")
    if not request.tokens or min(request.tokens) < 1:
        raise ConfigError(f"tokens {request.tokens}: give one or more positive numbers")
    if request.num_experts % request.ranks or request.top_k > request.num_experts:
        raise ConfigError(
            f"{request.num_experts} experts, top {request.top_k}, {request.ranks} ranks: give experts that "
            "divide among the ranks, and are at least as many as a token has"
        )
    if not isinstance(getattr(torch, request.dtype, None), torch.dtype):
        raise ConfigError(f"{request.dtype!r} is no dtype of torch")
    return request


def run_moe_bench(request: MoeRequest, timeout: float) -> list[dict[str, Any]]:
    """Measure, in processes of its own: a row per number of tokens, backend and baseline.

    Raises:
        ConfigError: when the request makes no sense.
        CommError: when a process failed or the deadline passed.
    """
    check_moe_request(request)
    rows: list[dict[str, Any]] = run_ranks(
        request.ranks, _measure_all, request, timeout=timeout, pin=request.pin
    )
    return rows


def _measure_all(request: MoeRequest) -> list[dict[str, Any]]:
    with Communicator(timeout=_SETUP_SECONDS) as comm:
        return [row for tokens in request.tokens for row in _measure(comm, request, tokens)]


def _measure(comm: Communicator, request: MoeRequest, num_tokens: int) -> list[dict[str, Any]]:
    """All backends at one number of tokens. **Collective.**"""
    schedule, names = request.schedule, request.backends
    if num_tokens >= _MANY_TOKENS:
        schedule = dataclasses.replace(schedule, blocks=min(4, schedule.blocks), calls=2, warmups=1)
        names = tuple(name for name in names if name not in _FIXED_CAPACITY)
    shape = MoeShape(
        request.num_experts, request.top_k, request.hidden, num_tokens, getattr(torch, request.dtype)
    )
    with contextlib.ExitStack() as stack:
        backends = {name: make_backend(name, shape, timeout=_SETUP_SECONDS) for name in names}
        for backend in backends.values():
            stack.callback(backend.close)
        cores = {core for rank in _gather_cores() for core in rank}
        settle = comm.barrier if len(cores) < comm.world_size else None
        seconds, wrong = time_alternating(_candidates(shape, comm, backends), schedule, comm.barrier, settle)
        num_calls = schedule.blocks * (schedule.warmups + schedule.calls)
        wire = {name: backend.wire_nbytes // num_calls for name, backend in backends.items()}
    microseconds = {name: slowest(values, _gather) for name, values in seconds.items()}
    wrong = {name: int(_gather(torch.tensor([n], device="cpu")).sum()) for name, n in wrong.items()}
    affinity = f"{len(cores)} cores for {comm.world_size} ranks"
    facts = {"ranks": comm.world_size, "tokens": num_tokens, "hidden": request.hidden, "affinity": affinity}
    return [
        facts | _row(name, baseline, microseconds, wrong) | {"wire_nbytes": wire[name]}
        for name in names
        for baseline in _BASELINES
    ]


def _candidates(shape: MoeShape, comm: Communicator, backends: Mapping[str, Backend]) -> dict[str, Candidate]:
    inputs = [_Input(shape, 100 * turn + comm.rank, comm.world_size) for turn in range(_NUM_INPUTS)]
    candidates = {
        name: _Contender(name, _forward_of(backend), inputs).candidate() for name, backend in backends.items()
    }
    for name, make in _BASELINES.items():
        # gloo's threads sleep between calls; without this its times would be two or three times worse.
        candidates[name] = _Contender(name, make(shape.num_experts).forward, inputs).candidate(dist.barrier)
    return candidates


def _row(
    name: str, baseline: str, microseconds: Mapping[str, Any], wrong: Mapping[str, int]
) -> dict[str, Any]:
    ours, theirs = percentiles(microseconds[name]), percentiles(microseconds[baseline])
    return {
        "op": "moe",
        "backend": name,
        "median_us": ours.median_us,
        "p10_us": ours.p10_us,
        "p90_us": ours.p90_us,
        "wrong": wrong[name],
        "baseline": baseline,
        "baseline_us": theirs.median_us,
        "baseline_p10_us": theirs.p10_us,
        "baseline_p90_us": theirs.p90_us,
        "ratio": theirs.median_us / ours.median_us,
        "checked": wrong[name] + wrong[baseline] == 0,
    }


class _Input:
    """Tokens of one rank, their routes, and what has to come out."""

    def __init__(self, shape: MoeShape, seed: int, world_size: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = (shape.max_num_tokens, shape.hidden)
        self.x = torch.randn(size, generator=generator, device="cpu").to(shape.dtype)
        scores = torch.rand(shape.max_num_tokens, shape.num_experts, generator=generator, device="cpu")
        self.weights, self.idx = scores.topk(shape.top_k, dim=1)
        ranks = torch.zeros(shape.max_num_tokens, world_size, device="cpu")
        ranks.scatter_(1, self.idx // (shape.num_experts // world_size), 1.0)
        self._factors = {True: self.weights.sum(1, keepdim=True), False: ranks.sum(1, keepdim=True)}

    def count_wrong(self, got: torch.Tensor, sums_experts: bool) -> int:
        """Elements that are not the token's times its weights, or times its number of ranks."""
        wanted = self.x * self._factors[sums_experts]
        # Not the other way round: a NaN is wrong.
        return int((~((got - wanted).abs() <= _TOLERANCE * wanted.abs())).sum())


class _Identity:
    """Experts that return what they get."""

    def flat(self, x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        return x

    def batched(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        return x


_Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _forward_of(backend: Backend) -> _Forward:
    return lambda x, idx, weights: backend.forward(x, idx, weights, _Identity())


class _Contender:
    """A way there and back, on one input after another."""

    def __init__(self, name: str, forward: _Forward, inputs: Sequence[_Input]) -> None:
        self._sums_experts = name in _SUMMING_EXPERTS
        self._forward = forward
        self._inputs = inputs
        self._turn = 0
        self._result: torch.Tensor | None = None

    def candidate(self, before: Callable[[], object] | None = None) -> Candidate:
        """To be timed; `before` is called ahead of each call."""

        def prepare() -> None:
            self._turn += 1
            self._result = None
            if before is not None:
                before()

        return Candidate(self._run, prepare, self._count_wrong)

    def _run(self) -> None:
        given = self._inputs[self._turn % len(self._inputs)]
        self._result = self._forward(given.x, given.idx, given.weights)

    def _count_wrong(self) -> int:
        given = self._inputs[self._turn % len(self._inputs)]
        assert self._result is not None
        return given.count_wrong(self._result, self._sums_experts)


def moe_columns(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows for people."""
    return [
        [
            str(row["tokens"]),
            row["backend"],
            f"{row['median_us']:.0f}",
            f"{row['p10_us']:.0f}",
            f"{row['p90_us']:.0f}",
            str(row["wrong"]),
            f"{row['wire_nbytes'] / 2**20:.2f}",
            row["baseline"],
            f"{row['baseline_us']:.0f}",
            f"{row['ratio']:.3g}",
        ]
        for row in rows
    ]


MOE_HEADER = (
    "tokens", "backend", "time (us)", "p10", "p90", "#wrong", "wire (MiB)", "baseline", "its (us)", "ratio",
)  # fmt: skip
"""Titles of `moe_columns`."""
