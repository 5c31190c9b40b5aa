"""Real processes for tests: forked from a server that has torch, Triton and tcomm loaded.

`RankServer.run(world_size, fn, *args)` calls `fn(member, *args)` in `world_size` processes and returns
their results. A failure shows the rank and its traceback; a rank that is silent past the deadline is killed.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import faulthandler
import itertools
import multiprocessing
import multiprocessing.connection
import sys
import time
import traceback

import torch
import torch.distributed as dist

import tcomm
from tcomm.config import Config
from tcomm.memory.arena import Arena, open_arena
from tcomm.memory.exchange import StoreExchange


@dataclasses.dataclass
class Member:
    """One rank of a test's world."""

    rank: int
    world_size: int
    store: dist.Store
    meetings: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def communicator(self, name="test", timeout=20.0, **kwargs) -> tcomm.Communicator:
        """A communicator over the store, with nothing to fall back to."""
        return tcomm.Communicator.from_store(
            self.store, self.rank, self.world_size, name=name, timeout=timeout, **kwargs
        )

    def process_group(self, seconds=20.0) -> None:
        """Initialise torch.distributed with gloo."""
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore("gloo", self.store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=datetime.timedelta(seconds=seconds),
        )
        # gloo does not wait at the end: who fails at once would close what a late rank still connects to.
        self.meet("process group", seconds)

    def exchange(self, name="test") -> StoreExchange:
        """Byte exchange between the ranks."""
        return StoreExchange(self.store, self.rank, self.world_size, name)

    def arena(self, staging_bytes=1 << 20, name="arena", spins=20, directory="") -> Arena:
        """Control pages and staging, without a communicator."""
        arena = open_arena(name, self.exchange(name), directory or Config().shm_dir, spins, 20.0)
        assert isinstance(arena, Arena), arena
        arena.grow(staging_bytes, 20.0)
        return arena

    def meet(self, name, timeout=20.0) -> None:
        """Wait for all ranks, by the store alone; a name may be used again."""
        self.meetings[name] += 1
        self.exchange(f"meet/{name}/{self.meetings[name]}").all_gather(b"", timeout)


@dataclasses.dataclass
class Outcome:
    """How a rank ended."""

    rank: int
    value: object = None
    error: str = ""
    exitcode: int | None = None
    seconds: float = 0.0


class RankServer:
    """Starts ranks; one per test session."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.preload"])
        self._store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=60)
        )
        self._numbers = itertools.count()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        del self._store

    def fork(self, fn, *args):
        """A process that calls `fn(*args)`."""
        process = self._context.Process(target=fn, args=args)
        process.start()
        return process

    def run(self, world_size, fn, *args, timeout=60.0, check=True, during=None):
        """Call `fn(member, *args)` on `world_size` ranks.

        Args:
            world_size: number of processes.
            fn: a function of a test module.
            args: picklable.
            timeout: seconds until whoever still runs is killed.
            check: raise when a rank fails; else return outcomes.
            during: called with the processes while they run, from the test's own process.

        Returns:
            Their values in rank order, or with `check=False` their `Outcome`s.
        """
        number = next(self._numbers)
        processes, pipes = [], []
        for rank in range(world_size):
            receiver, sender = self._context.Pipe(duplex=False)
            process = self._context.Process(
                target=_serve, args=(sender, rank, world_size, self._store.port, number, timeout, fn, args)
            )
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        if during is not None:
            during(processes)
        outcomes = _collect(processes, pipes, timeout)
        if check:
            failed = [o for o in outcomes if o.error]
            assert not failed, "\n".join(f"--- rank {o.rank} of {world_size}:\n{o.error}" for o in failed)
            return [o.value for o in outcomes]
        return outcomes


def _collect(processes, pipes, timeout):
    """Wait for every rank's message and end; kill those past the deadline."""
    started = time.monotonic()
    outcomes = [Outcome(rank) for rank in range(len(processes))]
    waiting = dict(enumerate(pipes))
    while waiting and time.monotonic() - started < timeout:
        for pipe in multiprocessing.connection.wait(list(waiting.values()), 0.2):
            rank = pipes.index(pipe)
            del waiting[rank]
            with contextlib.suppress(EOFError):
                outcomes[rank].value, outcomes[rank].error = pipe.recv()
            outcomes[rank].seconds = time.monotonic() - started
    for rank, process in enumerate(processes):
        process.join(max(0.1, started + timeout + 5 - time.monotonic()) if rank not in waiting else 0.0)
        if process.is_alive():
            process.kill()
            process.join()
            outcomes[rank].error = outcomes[rank].error or f"still running after {timeout} s; killed"
        outcomes[rank].exitcode = process.exitcode
        if process.exitcode and not outcomes[rank].error:
            outcomes[rank].error = f"ended with exit code {process.exitcode} and no word"
        process.close()
        pipes[rank].close()
    return outcomes


def _serve(sender, rank, world_size, port, number, timeout, fn, args):
    faulthandler.dump_traceback_later(timeout + 2, exit=True)
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=timeout)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=limit)
    try:
        value, error = fn(Member(rank, world_size, dist.PrefixStore(str(number), store)), *args), ""
    except BaseException as failure:
        if isinstance(failure, SystemExit):
            raise
        value, error = None, "".join(traceback.format_exception(failure))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    sender.send((value, error))
    sender.close()
    sys.stdout.flush()
