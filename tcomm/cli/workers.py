"""Ranks for a command: spawned, given a process group, and ended by a deadline."""

from __future__ import annotations

import datetime
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import ProcessException, start_processes

from tcomm.errors import CommError, ConfigError

__all__ = ["run_ranks"]


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float, pin: bool = False) -> Any:
    """Call `fn(*args)` in `world_size` processes that share a gloo process group.

    Args:
        world_size: number of processes.
        fn: a module's function; what it returns must be what JSON can say.
        args: picklable.
        timeout: seconds, after which all are killed.
        pin: give each rank one core.

    Returns:
        What rank 0 returned.

    Raises:
        ConfigError: when world_size is not positive.
        CommError: when a rank failed or the deadline passed.
    """
    if world_size < 1:
        raise ConfigError(f"{world_size} ranks; there must be at least one")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="tcomm-") as directory:
        path = f"{directory}/result.json"
        context = start_processes(
            _serve,
            (world_size, store.port, path, timeout, pin, fn, args),
            nprocs=world_size,
            join=False,
            start_method="spawn",
        )
        try:
            deadline = time.monotonic() + timeout
            while not context.join(timeout=0.5):
                if time.monotonic() > deadline:
                    raise CommError(f"{world_size} ranks were not done after {timeout:g} s")
        except ProcessException as error:
            raise CommError(f"a rank failed: {error}") from error
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return msgspec.json.decode(pathlib.Path(path).read_bytes())


def _serve(
    rank: int,
    world_size: int,
    port: int,
    path: str,
    timeout: float,
    pin: bool,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    if pin:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=timeout)
    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
    try:
        result = fn(*args)
        if rank == 0:
            pathlib.Path(path).write_bytes(msgspec.json.encode(result))
        dist.barrier()
    finally:
        dist.destroy_process_group()
