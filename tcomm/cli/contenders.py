"""The same collectives on tcomm, torch.distributed and MPI, each as one would write it with that library.

A method is one call of the verb of its name; it returns the result of this rank, or None where it has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from tcomm.cli.cases import ROOT, Case
from tcomm.errors import ConfigError

__all__ = ["BASELINES", "Calls", "Gloo", "Mpi", "Tcomm", "refuse_unknown_to_mpi"]

Result = Any
"""A tensor, or None where a rank gets nothing."""


class Calls:
    """What contenders share: a case's tensors, ready for a call."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.x = case.x
        self.is_root = case.rank == ROOT
        self.next = (case.rank + 1) % case.world_size
        self.previous = (case.rank - 1) % case.world_size

    def call_of(self, op: str) -> Callable[[], Result]:
        """The call of a verb."""
        call: Callable[[], Result] = getattr(self, op)
        return call

    def _out(self) -> torch.Tensor:
        """Where a result goes: the same memory each time, or new."""
        return self.case.out if self.case.reuses else torch.empty_like(self.case.out)

    def _in_place(self) -> torch.Tensor:
        """Input and result of what is in place by nature: x itself, or a copy of its own."""
        return self.x if self.case.reuses else self.x.clone()

    def _averaged(self, result: torch.Tensor) -> torch.Tensor:
        return result.mul_(1.0 / self.case.world_size) if self.case.redop == "avg" else result

    def _shift(
        self, send: Callable[[torch.Tensor], object], recv: Callable[[torch.Tensor], object]
    ) -> torch.Tensor:
        """Send to the next rank and receive from the one before: for two ranks, a round trip."""
        out = self._out()
        # Even ranks send first, or all would wait in a send that no one receives.
        if self.case.rank % 2:
            recv(out)
            send(self.x)
        else:
            send(self.x)
            recv(out)
        return out


class Tcomm(Calls):
    """A communicator's own.

    Args:
        case: what to call.
        comm: to call it on.
        algorithm: that must be used; empty: the table's.
    """

    def __init__(self, case: Case, comm: Any, algorithm: str) -> None:
        super().__init__(case)
        self.comm = comm
        self.redop = case.redop
        self.out = case.out if case.reuses else None
        # Of the ranks that get nothing, none may say where it goes.
        self.root_out = self.out if case.has_result else None
        self.algorithm = algorithm
        w = case.world_size
        self.sends, self.recvs = case.parts, [case.parts[case.rank]] * w

    def all_reduce(self) -> Result:
        return self.comm.all_reduce(self.x, self.redop, out=self.out, algorithm=self.algorithm)

    def reduce(self) -> Result:
        return self.comm.reduce(self.x, ROOT, self.redop, out=self.root_out, algorithm=self.algorithm)

    def reduce_scatter(self) -> Result:
        return self.comm.reduce_scatter_single(self.x, self.redop, out=self.out, algorithm=self.algorithm)

    def reduce_scatterv(self) -> Result:
        return self.comm.reduce_scatterv(
            self.x, self.sends, self.redop, out=self.out, algorithm=self.algorithm
        )

    def broadcast(self) -> Result:
        out = self.x if self.case.reuses else None
        return self.comm.broadcast(self.x, ROOT, out=out, algorithm=self.algorithm)

    def all_gather(self) -> Result:
        return self.comm.all_gather_single(self.x, out=self.out, algorithm=self.algorithm)

    def all_gatherv(self) -> Result:
        return self.comm.all_gatherv(self.x, self.sends, out=self.out, algorithm=self.algorithm)

    def gather(self) -> Result:
        return self.comm.gather(self.x, ROOT, out=self.root_out, algorithm=self.algorithm)

    def scatter(self) -> Result:
        x = None if self.case.reuses and not self.is_root else self.x
        return self.comm.scatter(x, ROOT, out=self.out, algorithm=self.algorithm)

    def all_to_all(self) -> Result:
        return self.comm.all_to_all_single(self.x, out=self.out, algorithm=self.algorithm)

    def all_to_allv(self) -> Result:
        return self.comm.all_to_all_single(
            self.x, self.sends, self.recvs, out=self.out, algorithm=self.algorithm
        )

    def sendrecv(self) -> Result:
        return self._shift(
            lambda x: self.comm.send(x, self.next), lambda out: self.comm.recv(out, self.previous)
        )

    def barrier(self) -> Result:
        self.comm.barrier()
        return None


class Gloo(Calls):
    """torch.distributed's on the default process group."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        ops = {"sum": dist.ReduceOp.SUM, "avg": dist.ReduceOp.SUM}
        self.redop = ops.get(case.redop) or getattr(dist.ReduceOp, case.redop.upper())
        # Torch 2.13 gave them new names.
        self.gather_all: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        self.scatter_reduced: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        self.longest = max(case.parts)

    def all_reduce(self) -> Result:
        out = self._in_place()
        dist.all_reduce(out, self.redop)
        return self._averaged(out)

    def reduce(self) -> Result:
        out = self._in_place()
        dist.reduce(out, ROOT, self.redop)
        return self._averaged(out) if self.is_root else None

    def reduce_scatter(self) -> Result:
        out = self._out()
        self.scatter_reduced(out, self.x, self.redop)
        return self._averaged(out)

    def reduce_scatterv(self) -> Result:
        out = self._out()
        dist.reduce_scatter(out, list(self.x.split(self.case.parts)), self.redop)
        return self._averaged(out)

    def broadcast(self) -> Result:
        out = self._in_place()
        dist.broadcast(out, ROOT)
        return out

    def all_gather(self) -> Result:
        out = self._out()
        self.gather_all(out, self.x)
        return out

    def all_gatherv(self) -> Result:
        # gloo refuses unequal parts: pad them all to the longest, and cut.
        padded = self.x.new_empty(self.longest)
        padded[: len(self.x)].copy_(self.x)
        gathered = padded.new_empty(self.case.world_size * self.longest)
        self.gather_all(gathered, padded)
        rows = gathered.view(self.case.world_size, -1)
        parts = [row[:length] for row, length in zip(rows, self.case.parts, strict=True)]
        return torch.cat(parts, out=self._out())

    def gather(self) -> Result:
        out = self._out() if self.is_root else None
        dist.gather(self.x, None if out is None else list(out.split(self.case.parts)), ROOT)
        return out

    def scatter(self) -> Result:
        out = self._out()
        dist.scatter(out, list(self.x.split(self.case.parts)) if self.is_root else None, ROOT)
        return out

    def all_to_all(self) -> Result:
        out = self._out()
        dist.all_to_all_single(out, self.x)
        return out

    def all_to_allv(self) -> Result:
        out, parts = self._out(), self.case.parts
        dist.all_to_all_single(out, self.x, [parts[self.case.rank]] * len(parts), parts)
        return out

    def sendrecv(self) -> Result:
        return self._shift(lambda x: dist.send(x, self.next), lambda out: dist.recv(out, self.previous))

    def barrier(self) -> Result:
        dist.barrier()
        return None


class Mpi(Calls):
    """MPI's on all ranks of mpirun, through mpi4py on the tensors' own memory."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        # Starts MPI where it is not started; nobody but who asks for it may do that.
        from mpi4py import MPI

        self.comm: Any = MPI.COMM_WORLD
        self.redop: Any = {"max": MPI.MAX, "min": MPI.MIN}.get(case.redop, MPI.SUM)

    def all_reduce(self) -> Result:
        out = self._out()
        self.comm.Allreduce(_memory(self.x), _memory(out), self.redop)
        return self._averaged(out)

    def reduce(self) -> Result:
        if not self.is_root:
            self.comm.Reduce(_memory(self.x), None, self.redop, ROOT)
            return None
        out = self._out()
        self.comm.Reduce(_memory(self.x), _memory(out), self.redop, ROOT)
        return self._averaged(out)

    def reduce_scatter(self) -> Result:
        out = self._out()
        self.comm.Reduce_scatter_block(_memory(self.x), _memory(out), self.redop)
        return self._averaged(out)

    def reduce_scatterv(self) -> Result:
        out = self._out()
        self.comm.Reduce_scatter(_memory(self.x), _memory(out), self.case.parts, self.redop)
        return self._averaged(out)

    def broadcast(self) -> Result:
        out = self._in_place()
        self.comm.Bcast(_memory(out), ROOT)
        return out

    def all_gather(self) -> Result:
        out = self._out()
        self.comm.Allgather(_memory(self.x), _memory(out))
        return out

    def all_gatherv(self) -> Result:
        out = self._out()
        self.comm.Allgatherv(_memory(self.x), [_memory(out), self.case.parts])
        return out

    def gather(self) -> Result:
        out = self._out() if self.is_root else None
        self.comm.Gather(_memory(self.x), None if out is None else _memory(out), ROOT)
        return out

    def scatter(self) -> Result:
        out = self._out()
        self.comm.Scatter(_memory(self.x) if self.is_root else None, _memory(out), ROOT)
        return out

    def all_to_all(self) -> Result:
        out = self._out()
        self.comm.Alltoall(_memory(self.x), _memory(out))
        return out

    def all_to_allv(self) -> Result:
        out, parts = self._out(), self.case.parts
        received = [parts[self.case.rank]] * len(parts)
        self.comm.Alltoallv([_memory(self.x), parts], [_memory(out), received])
        return out

    def sendrecv(self) -> Result:
        return self._shift(
            lambda x: self.comm.Send(_memory(x), self.next),
            lambda out: self.comm.Recv(_memory(out), self.previous),
        )

    def barrier(self) -> Result:
        self.comm.Barrier()
        return None


BASELINES: dict[str, Callable[[Case], Calls]] = {"gloo": Gloo, "mpi": Mpi}
"""What tcomm can be measured against."""


def refuse_unknown_to_mpi(dtype: torch.dtype) -> None:
    """Refuse elements that MPI cannot reduce.

    Raises:
        ConfigError: names those.
    """
    if dtype in _WORDS:
        raise ConfigError(f"MPI has no {str(dtype).removeprefix('torch.')} to reduce; measure float32")


_WORDS: Sequence[torch.dtype] = (torch.float16, torch.bfloat16)


def _memory(x: torch.Tensor) -> Any:
    """The memory of a tensor as mpi4py takes it; bare words where MPI does not know the type."""
    return x.view(torch.int16).numpy() if x.dtype in _WORDS else x.numpy()
