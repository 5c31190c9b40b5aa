"""Ranks for a command: started by us or by mpirun, given a process group, and ended by a deadline."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import msgspec
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tcomm.cli.rank import Job, Start, write_whole
from tcomm.errors import CommError, ConfigError

__all__ = ["Ranks", "run_ranks", "why_no_mpi"]

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 10.0


def why_no_mpi() -> str:
    """Why ranks cannot have MPI here; empty when they can."""
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        return "there is no mpirun on the PATH"
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed; it comes with tcomm[mpi]"
    version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False)
    if "Open MPI" not in version.stdout:
        return f"{mpirun} is not Open MPI's"
    return ""


class Ranks:
    """Processes that share a gloo process group and, where asked, MPI; they serve calls until closed.

    Args:
        world_size: number of processes.
        pin: give each rank one core.
        mpi: start them by mpirun, so that the same processes hold MPI's communicator too.
        timeout: seconds that the process group waits for a peer.

    Raises:
        ConfigError: when world_size is not positive, or there is no MPI.
    """

    def __init__(self, world_size: int, *, pin: bool = False, mpi: bool = False, timeout: float) -> None:
        if world_size < 1:
            raise ConfigError(f"{world_size} ranks; there must be at least one")
        if mpi and (reason := why_no_mpi()):
            raise ConfigError(f"no MPI: {reason}")
        self.world_size = world_size
        self._calls = 0
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._directory = pathlib.Path(tempfile.mkdtemp(prefix="tcomm-"))
        start = Start(str(self._directory), self._store.port, world_size, timeout, pin, os.getpid())
        settings = msgspec.json.encode(start).decode()
        ranks = [[*_mpirun(world_size), *_python(settings, "mpi")]]
        if not mpi:
            ranks = [_python(settings, str(rank)) for rank in range(world_size)]
        self._processes = [subprocess.Popen(command, stdin=subprocess.DEVNULL) for command in ranks]

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float) -> Any:
        """Call `fn(*args)` in every rank.

        Args:
            fn: a module's function; what it returns must be what JSON can say.
            args: what JSON can say, and records of fields like that where fn's signature names the record.
            timeout: seconds, after which all ranks are killed.

        Returns:
            What rank 0 returned.

        Raises:
            CommError: when a rank failed or the deadline passed; the ranks are gone.
        """
        self._calls += 1
        job = Job(_module_of(fn), fn.__qualname__, msgspec.Raw(msgspec.json.encode(args)))
        write_whole(self._directory / f"job-{self._calls}.json", msgspec.json.encode(job))
        result = self._directory / f"result-{self._calls}.json"
        deadline = time.monotonic() + timeout
        while not result.exists():
            self._refuse_failed()
            if time.monotonic() > deadline:
                self.close()
                raise CommError(f"{self.world_size} ranks were not done after {timeout:g} s")
            time.sleep(_POLL_SECONDS)
        return msgspec.json.decode(result.read_bytes())

    def _refuse_failed(self) -> None:
        """Raise for the rank that failed first; the others fail because of it."""
        codes = [process.poll() for process in self._processes]
        failures = sorted(self._directory.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
        if failures:
            told = failures[0].read_text()
            self.close()
            raise CommError(f"a rank failed: {failures[0].name.removeprefix('error-')}: {told}")
        if any(code is not None for code in codes):
            self.close()
            raise CommError(
                f"a rank failed: it ended with exit code {next(c for c in codes if c is not None)}"
            )

    def close(self) -> None:
        """End all ranks: by word where they are idle, by signal where they are not."""
        if not self._directory.exists():
            return
        idle = self._calls == 0 or (self._directory / f"result-{self._calls}.json").exists()
        if idle:
            write_whole(self._directory / f"job-{self._calls + 1}.json", b"null")
        else:
            # mpirun ends its ranks when it is asked to, and leaves them behind when it is killed.
            for process in self._processes:
                process.terminate()
        deadline = time.monotonic() + _GRACE_SECONDS
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run_ranks(
    world_size: int, fn: Callable[..., Any], *args: Any, timeout: float, pin: bool = False, mpi: bool = False
) -> Any:
    """Call `fn(*args)` once in `world_size` processes of its own; see `Ranks`.

    Returns:
        What rank 0 returned.

    Raises:
        ConfigError, CommError: as `Ranks` and its `run` do.
    """
    with Ranks(world_size, pin=pin, mpi=mpi, timeout=timeout) as ranks:
        return ranks.run(fn, *args, timeout=timeout)


def _python(settings: str, rank: str) -> list[str]:
    # The path of this process and not only its environment: it may be a script or a test.
    code = f"import sys; sys.path[:] = {sys.path!r}; from tcomm.cli.rank import main; main()"
    return [sys.executable, "-c", code, settings, rank]


def _mpirun(world_size: int) -> Sequence[str]:
    # Pinning is ours, the same for everything that is measured.
    command = ["mpirun", "-n", str(world_size), "--bind-to", "none", "--oversubscribe"]
    if os.geteuid() == 0:
        command += ["--allow-run-as-root"]
    if world_size > len(os.sched_getaffinity(0)):
        command += ["--mca", "mpi_yield_when_idle", "1"]
    return command


def _module_of(fn: Callable[..., Any]) -> str:
    """The name of a function's module, or the file of a script."""
    if fn.__module__ != "__main__":
        return fn.__module__
    return str(pathlib.Path(sys.modules["__main__"].__file__ or "").resolve())
