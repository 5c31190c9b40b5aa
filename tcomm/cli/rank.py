"""One rank of a command: joins the process group and MPI, then does what its parent writes down for it."""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import itertools
import os
import pathlib
import runpy
import shutil
import signal
import sys
import threading
import time
import traceback
import typing
from collections.abc import Callable
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tcomm.errors import TcommError

__all__ = ["Job", "Start", "main", "write_whole"]

_POLL_SECONDS = 0.005
_PARENT_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Start:
    """What a rank is started with."""

    directory: str
    """Where the jobs, results and errors are; nobody else may read it."""
    port: int
    """Of the store."""
    world_size: int
    """Number of ranks."""
    timeout: float
    """Seconds that the process group waits for a peer."""
    pin: bool
    """Give each rank one core."""
    parent: int
    """The process without which a rank has nothing to do."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A call that every rank makes."""

    module: str
    """Its name, or the file of a script."""
    function: str
    """Name of the function."""
    args: msgspec.Raw
    """A list."""


def write_whole(path: pathlib.Path, data: bytes) -> None:
    """Write a file that nobody sees half written, nor under a name that begins like its own."""
    part = path.with_name(f"part-{os.getpid()}-{path.name}")
    part.write_bytes(data)
    part.rename(path)


def main() -> None:
    """Serve until the parent says so, or is gone."""
    start = msgspec.json.decode(sys.argv[1], type=Start)
    directory = pathlib.Path(start.directory)
    threading.Thread(target=_end_with, args=(start.parent, directory), daemon=True).start()
    rank = -1
    try:
        rank = _rank_of(sys.argv[2])
        _settle(start, rank)
        for number in itertools.count(1):
            job = _next_job(directory / f"job-{number}.json")
            if job is None:
                break
            result = _call(job)
            dist.barrier()
            if rank == 0:
                write_whole(directory / f"result-{number}.json", msgspec.json.encode(result))
        dist.destroy_process_group()
    except BaseException as error:  # noqa: BLE001 - the parent raises it
        # MPI's end waits for all ranks, and the others may wait for this one: the parent ends them.
        is_said = isinstance(error, TcommError)
        told = f"{type(error).__name__}: {error}" if is_said else traceback.format_exc()
        write_whole(directory / f"error-rank {rank}", told.encode())
        raise SystemExit(1) from None


def _rank_of(given: str) -> int:
    if given != "mpi":
        return int(given)
    from mpi4py import MPI

    return int(MPI.COMM_WORLD.Get_rank())


def _settle(start: Start, rank: int) -> None:
    if start.pin:
        cores = sorted(os.sched_getaffinity(0))
        # All threads: those that MPI and torch have started by now are not to disturb the others' cores.
        for task in pathlib.Path("/proc/self/task").iterdir():
            os.sched_setaffinity(int(task.name), {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=start.timeout)
    store = TCPStore("127.0.0.1", start.port, is_master=False, wait_for_workers=False, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=start.world_size, timeout=limit)


def _next_job(path: pathlib.Path) -> Job | None:
    while not path.exists():
        time.sleep(_POLL_SECONDS)
    return msgspec.json.decode(path.read_bytes(), type=Job | None)


def _call(job: Job) -> Any:
    fn = _find(job.module, job.function)
    hints = typing.get_type_hints(fn)
    names = fn.__code__.co_varnames
    args = msgspec.json.decode(job.args, type=list[Any])
    typed = [msgspec.convert(arg, hints.get(name, Any)) for name, arg in zip(names, args, strict=False)]
    return fn(*typed)


def _find(module: str, name: str) -> Callable[..., Any]:
    if module.endswith(".py"):
        return typing.cast("Callable[..., Any]", runpy.run_path(module, run_name="__rank__")[name])
    return typing.cast("Callable[..., Any]", getattr(importlib.import_module(module), name))


def _end_with(parent: int, directory: pathlib.Path) -> None:
    """End this process when its parent has: nobody would ever write another job, or tidy up."""
    while pathlib.Path(f"/proc/{parent}").exists():
        time.sleep(_PARENT_SECONDS)
    shutil.rmtree(directory, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGTERM)
