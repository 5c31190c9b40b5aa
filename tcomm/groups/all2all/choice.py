"""The choice of a manager: a pure function of what all ranks know, and its reasons."""

from __future__ import annotations

import dataclasses

from tcomm.errors import CapabilityError, ConfigError

__all__ = ["BACKENDS", "Choice", "Exchanged", "choose_backend"]

AUTO = "auto"
_GATHER, _HT, _LL = "allgather_reducescatter", "deepep_high_throughput", "deepep_low_latency"
_BY_NAME = "its layout is that of one kind of expert kernel; ask for it by name"
BACKENDS: dict[str, str] = {
    _GATHER: "tcomm.groups.all2all.gather.AgRsAll2AllManager",
    "naive": "tcomm.groups.all2all.naive.NaiveAll2AllManager",
    _HT: "tcomm.groups.all2all.deep_ep.DeepEPHTAll2AllManager",
    _LL: "tcomm.groups.all2all.deep_ep.DeepEPLLAll2AllManager",
    "pplx": "tcomm.groups.all2all.pplx.PPLXAll2AllManager",
    "flashinfer_all2allv": "tcomm.groups.all2all.flashinfer.FlashInferNVLinkTwoSidedManager",
    "flashinfer_nvlink_two_sided": "tcomm.groups.all2all.flashinfer.FlashInferNVLinkTwoSidedManager",
    "flashinfer_nvlink_one_sided": "tcomm.groups.all2all.flashinfer.FlashInferNVLinkOneSidedManager",
    "nixl_ep": "tcomm.groups.all2all.nixl.NixlEPAll2AllManager",
}
"""Names of backends, as vllm.distributed spells them, and the managers behind them."""

_BYTES_PER_US = {"cpu": 800.0, "cuda": 300_000.0}
_STEP_US = {"cpu": 60.0, "cuda": 8.0}
"""What one rank moves, and what it costs that all wait for all: the same on every rank.

On a CPU as measured with two ranks a core; on GPUs nobody has measured it yet."""
_SHARE_OF_FREE_MEMORY = 2


@dataclasses.dataclass(frozen=True)
class Exchanged:
    """What the layers of a group exchange, in terms that are the same on every rank."""

    max_tokens: int
    """The most that a rank ever brings."""
    hidden: int
    """Channels of a token."""
    topk: int
    """Experts that a token goes to."""
    num_experts: int
    """Of all ranks."""
    world_size: int
    """Ranks that the experts are spread over."""
    itemsize: int = 2
    """Bytes of a channel."""
    device: str = "cpu"
    """Device type of the tokens."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "hidden", "topk", "num_experts", "world_size", "itemsize"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name}={value!r} of an exchange of tokens; give a number of 1 or more")
        if self.device not in _STEP_US:
            raise ConfigError(f"device={self.device!r} of an exchange of tokens; give 'cpu' or 'cuda'")

    @property
    def row_nbytes(self) -> int:
        """Bytes of a token."""
        return self.hidden * self.itemsize

    @property
    def gathered_rows(self) -> float:
        """Rows that a rank moves where everybody gets every token."""
        return self.max_tokens * (self.world_size - 1)

    @property
    def rows_by_rank(self) -> float:
        """Rows that a rank moves with one copy per token and rank, where routing is even."""
        share = 1 - (1 - 1 / self.world_size) ** self.topk
        return self.gathered_rows * share

    @property
    def rows_by_expert(self) -> float:
        """Rows that a rank moves with one copy per token and expert, where routing is even."""
        return self.max_tokens * self.topk * (self.world_size - 1) / self.world_size


@dataclasses.dataclass(frozen=True)
class Choice:
    """The backend for an exchange, and why not the others."""

    exchanged: Exchanged
    """What it was chosen for."""
    name: str
    """As in `BACKENDS`."""
    reason: str
    """Why this one."""
    rejected: tuple[tuple[str, str], ...]
    """Every other backend, and why not that."""
    predicted_us: tuple[tuple[str, float], ...] = ()
    """What a rough model says of a dispatch and its combine."""

    def __str__(self) -> str:
        """A few lines for people."""
        asked = self.exchanged
        lines = [
            f"{asked.max_tokens} tokens a rank of {asked.row_nbytes} bytes, {asked.topk} of "
            f"{asked.num_experts} experts on {asked.world_size} ranks ({asked.device}): {self.name}",
            f"  because {self.reason}",
        ]
        return "\n".join([*lines, *(f"  not {name}: {why}" for name, why in self.rejected)])


def choose_backend(
    exchanged: Exchanged,
    nbytes: dict[str, int],
    free_nbytes: int,
    *,
    forced: str = AUTO,
    no_shared_memory: str = "",
) -> Choice:
    """Pick the backend. Pure: the same arguments give the same choice on every rank.

    Args:
        exchanged: what is exchanged.
        nbytes: what the buffers of a backend take of each rank's memory; those that are missing take none.
        free_nbytes: what the rank with least of it has free.
        forced: a name of `BACKENDS` that must be used, or "auto".
        no_shared_memory: why the ranks share none; empty where they do.

    Raises:
        ConfigError: when `forced` is no name.
        CapabilityError: when what is forced cannot be used.
    """
    if forced not in {*BACKENDS, AUTO}:
        raise ConfigError(
            f"all2all backend {forced!r} is unknown; give one of {', '.join([AUTO, *BACKENDS])}"
        )
    refusals = {
        name: _refusal(name, exchanged, nbytes.get(name, 0), free_nbytes, no_shared_memory)
        for name in BACKENDS
    }
    if forced != AUTO:
        if refusals[forced]:
            raise CapabilityError(f"{forced!r}, which was asked for, cannot be used: {refusals[forced]}")
        rejected = tuple((name, why or f"{forced!r} was asked for") for name, why in refusals.items())
        told = f"{forced!r} was asked for by name"
        return Choice(exchanged, forced, told, tuple(entry for entry in rejected if entry[0] != forced))
    times = {name: _predict_us(name, exchanged) for name in (_GATHER, _HT, _LL) if not refusals[name]}
    best, *others = sorted(times, key=times.__getitem__)
    reason = f"model, not a measurement: {times[best]:.0f} us"
    reason += f" against {times[others[0]]:.0f} us of {others[0]}" if others else "; nothing else can do it"
    rejected = tuple(
        (name, why or (f"model: {times[name]:.0f} us" if name in times else _BY_NAME))
        for name, why in refusals.items()
        if name != best
    )
    return Choice(exchanged, best, reason, rejected, tuple(times.items()))


def _refusal(name: str, exchanged: Exchanged, nbytes: int, free_nbytes: int, no_shared_memory: str) -> str:
    """Why a backend cannot do it; empty when it can."""
    if name in (_GATHER, "naive"):
        return ""
    if no_shared_memory:
        return no_shared_memory
    if exchanged.num_experts % exchanged.world_size:
        return f"{exchanged.num_experts} experts do not divide among {exchanged.world_size} ranks"
    if nbytes > free_nbytes // _SHARE_OF_FREE_MEMORY:
        return f"its buffers need {nbytes} bytes a rank, more than half of the {free_nbytes} that are free"
    return ""


def _predict_us(name: str, exchanged: Exchanged) -> float:
    """A dispatch and its combine; a layout, and counts that the host learns, are one more step each."""
    rows, steps = {
        _GATHER: (exchanged.gathered_rows, 2),
        _HT: (exchanged.rows_by_rank, 4),
        _LL: (exchanged.rows_by_expert, 2),
    }[name]
    moved = 2 * rows * exchanged.row_nbytes / _BYTES_PER_US[exchanged.device]
    return moved + steps * _STEP_US[exchanged.device]
