"""Batches of small tensors: one message and one wait for many collectives."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import torch

from tcomm.errors import ConfigError
from tcomm.groups.aliases import Aliases
from tcomm.groups.arguments import UNSET, check_out, check_tensor, share_bytes
from tcomm.groups.jobs import JOBS, Caller, Job
from tcomm.groups.packing import Packing, Split, describe_kinds

__all__ = ["Coalescing"]


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A collective that was asked for."""

    verb: str
    args: tuple[Any, ...]
    x: torch.Tensor
    out: torch.Tensor
    job: Job

    @property
    def kind(self) -> tuple[object, ...]:
        """What entries must share to travel together: bits must not depend on the company."""
        dtype = self.x.dtype if self.job.call.reduce else None
        return self.verb, self.job.call.reduce, self.job.call.root, dtype, self.x.device


class Coalescing:
    """Collects calls in a `with` block; when it ends, calls of one kind go as one. **Collective** then.

    ::

        with comm.coalescing() as batch:
            a = batch.all_reduce(x)
            b = batch.all_reduce(y, out=y)
        # a and y hold the results from here on, and x was not to be changed until here.

    Neighbours of one verb, reduce operation and root travel together, of any shapes; reductions of one
    dtype only. The bits are those of single calls. A block that raises sends nothing.

    Args:
        comm: whose collectives.
    """

    def __init__(self, comm: Aliases) -> None:
        self._comm = comm
        self._entries: list[_Entry] = []
        self._results: list[torch.Tensor] = []

    def all_reduce(
        self, x: torch.Tensor, op: object = "sum", *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As the communicator's; the result is there when the block has ended."""
        return self._add("all_reduce", (op,), x, out)

    def broadcast(self, x: torch.Tensor, root: int, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """As the communicator's; the result is there when the block has ended."""
        return self._add("broadcast", (root,), x, out)

    def all_gather_single(self, x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """As the communicator's along dim 0; the result is there when the block has ended."""
        return self._add("all_gather_single", (0,), x, out)

    def reduce_scatter_single(
        self, x: torch.Tensor, op: object = "sum", *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As the communicator's along dim 0; the result is there when the block has ended."""
        return self._add("reduce_scatter_single", (op, 0), x, out)

    def all_to_all_single(self, x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """As the communicator's, of equal parts; the result is there when the block has ended."""
        return self._add("all_to_all_single", (), x, out)

    def _add(
        self, verb: str, args: tuple[Any, ...], x: torch.Tensor, out: torch.Tensor | None
    ) -> torch.Tensor:
        comm = self._comm
        check_tensor(verb, x, comm.world_size > 1)
        if any(share_bytes(x, result) for result in self._results):
            raise ConfigError(
                f"{verb} takes a result of this block, which is not there before the block ends"
            )
        job = JOBS[verb](Caller(comm.rank, comm.world_size, x.shape, x.dtype), *args)
        if job.shape is None:
            raise ConfigError(f"{verb} gives this rank no result")
        if out is None:
            out = torch.empty(job.shape, dtype=x.dtype, device=x.device)
        else:
            check_out(verb, x, out, job.shape, job.may_alias)
            if any(share_bytes(out, result) for result in self._results):
                raise ConfigError(f"out= of {verb} overlaps another result of this block")
        self._entries.append(_Entry(verb, args, x, out, job))
        self._results.append(out)
        return out

    def __enter__(self) -> Self:
        self._entries, self._results = [], []
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        entries, self._entries = self._entries, []
        if error is None:
            for _, group in itertools.groupby(entries, key=lambda entry: entry.kind):
                self._run(list(group))

    def _run(self, entries: Sequence[_Entry]) -> None:
        first, world = entries[0], self._comm.world_size
        run: Callable[..., torch.Tensor] = getattr(self._comm, first.verb)
        if len(entries) == 1 or world == 1:
            # Gradients flow through the copies of a world of one, and would not through packing.
            for entry in entries:
                # A dimension is the last of a verb's arguments, and given by name.
                run(entry.x, *_without_dim(entry), out=entry.out)
            return
        as_bytes = not first.job.call.reduce
        takes = Packing([_split(e.x, world if first.verb in _APART else 1) for e in entries], as_bytes)
        gives = Packing([_split(e.out, world if first.verb in _TOGETHER else 1) for e in entries], as_bytes)
        told = describe_kinds((e.x.dtype, e.job.call.shape) for e in entries)
        packed = takes.pack([e.x for e in entries])
        flat = self._comm._collect(first.verb, first.args, packed, None, UNSET, False, "", told)
        gives.unpack(flat, [e.out for e in entries])


_APART = ("reduce_scatter_single", "all_to_all_single")
_TOGETHER = ("all_gather_single", "all_to_all_single")


def _split(x: torch.Tensor, chunks: int) -> Split:
    numel = x.numel()
    return Split((numel,), x.dtype, 0, (numel // chunks,) * chunks)


def _without_dim(entry: _Entry) -> tuple[Any, ...]:
    return entry.args[:-1] if entry.verb in {"all_gather_single", "reduce_scatter_single"} else entry.args
