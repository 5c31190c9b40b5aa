"""One rank's hold on a group: what it is made of, the order of its calls, and its end."""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import dataclasses
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from tcomm.config import Config, resolve_timeout
from tcomm.cpu.point_to_point import TransferPlan
from tcomm.errors import CapabilityError, GroupClosedError, PeerTimeoutError, TcommError
from tcomm.groups.agreement import Agreement, LocalAgreement, RemoteAgreement, SharedAgreement
from tcomm.groups.arguments import Timeout, Unset
from tcomm.groups.devices import DeviceMemory
from tcomm.groups.fallback import TorchFallback
from tcomm.groups.plans import PlanKey, Planner
from tcomm.groups.pool import ResultPool
from tcomm.groups.repeats import Repeat
from tcomm.groups.setup import Membership, agree_on_settings
from tcomm.groups.work import Work
from tcomm.memory.arena import Arena, open_arena
from tcomm.memory.base import Exchange, NotShared
from tcomm.memory.control import Word
from tcomm.memory.regions import Regions
from tcomm.signature import CallDescription
from tcomm.tuning.choose import Capabilities, Decision, Request, decide

__all__ = ["SETUP_SECONDS", "GroupHandle"]

logger = logging.getLogger("tcomm")

SETUP_SECONDS = 120.0
"""How long each step of setting a group up may take."""
_SPINS_WITH_A_CORE_EACH = 200
_SPINS_OTHERWISE = 4

_open: weakref.WeakSet[GroupHandle] = weakref.WeakSet()


def _after_fork() -> None:
    for handle in list(_open):
        # A thread of the parent may hold the lock, and will never give it back here.
        handle._lock, handle._queue_lock = threading.RLock(), threading.Lock()
        handle._foreign = f"the group belongs to process {os.getppid()}, from which this one was forked"


def _at_exit() -> None:
    for handle in list(_open):
        handle.close()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)


class GroupHandle:
    """What every communicator has besides its collectives. Made by `_start`, which is collective."""

    def _start(self, members: Membership, timeout: Timeout | Unset) -> None:
        self.config = Config.from_environment()
        self.name = members.name
        self.rank = members.exchange.rank
        self.world_size = members.exchange.world_size
        self.global_ranks = members.global_ranks
        self._members = members
        self._splits = 0
        self.timeout = resolve_timeout(self.config.timeout if isinstance(timeout, Unset) else timeout)
        self._lock = threading.RLock()
        self._queue_lock = threading.Lock()
        self._foreign = ""
        self._executor: concurrent.futures.ThreadPoolExecutor | None = None
        self._last_work: concurrent.futures.Future[Any] | None = None
        self._pool = ResultPool()
        settled = agree_on_settings(members, self.config, SETUP_SECONDS)
        self.table = settled.table
        self._arena, no_shared_memory = self._open_arena(members.exchange, settled.num_cores)
        self._regions = self._arena.regions if self._arena else Regions()
        group, channel = members.process_group, self._arena.channel if self._arena else None
        self._devices = DeviceMemory(members, self.config, channel, SETUP_SECONDS)
        self._fallback = None if group is None else TorchFallback(self.name, group, channel)
        self._agreement = self._make_agreement()
        self.capabilities = Capabilities(
            no_shared_memory=no_shared_memory,
            no_kernels=settled.no_kernels,
            torch_backends=self._fallback.backends if self._fallback else (),
        )
        self._planner = Planner(
            self.name, self.config, self._arena, self._fallback, self._agreement, SETUP_SECONDS, self._devices
        )
        self._plans: dict[PlanKey, Any] = {}
        self._repeats: dict[tuple[str, tuple[object, ...], str, str, int], Repeat] = {}
        self._transfers: dict[tuple[object, ...], TransferPlan] = {}
        self._transfer_reasons: set[str] = set()
        _open.add(self)

    def _open_arena(self, exchange: Exchange, num_cores: int) -> tuple[Arena | None, str]:
        if self.world_size == 1:
            return None, "a world of one needs no shared memory"
        # Ranks of other groups want these cores as well.
        num_ranks = max(self.world_size, dist.get_world_size() if dist.is_initialized() else 1)
        spins = _SPINS_WITH_A_CORE_EACH if num_ranks <= num_cores else _SPINS_OTHERWISE
        made = open_arena(self.name, exchange, self.config.shm_dir, self.config.spins or spins, SETUP_SECONDS)
        if isinstance(made, NotShared):
            logger.info("group %r uses torch.distributed: %s", self.name, made.reason)
            return None, made.reason
        return made, ""

    def _make_agreement(self) -> Agreement:
        if self._arena is not None:
            return SharedAgreement(self._arena.channel)
        if self.world_size == 1:
            return LocalAgreement()
        if self._fallback is None:
            raise CapabilityError(
                f"the ranks of group {self.name!r} share no memory and there is no process group behind "
                "it; make the communicator from a torch.distributed process group"
            )
        return RemoteAgreement(self.name, self._fallback)

    def _submit(self, run: Callable[[], Any]) -> Work:
        """Run behind the caller's back, after everything that was submitted before."""
        if self._executor is None:
            self._executor = concurrent.futures.ThreadPoolExecutor(1, f"tcomm-{self.name}")
        self._last_work = self._executor.submit(run)
        return Work(self._last_work, self._explain_delay)

    def _in_order(self, run: Callable[[], Any], async_op: bool) -> Any:
        """Run now, or where asynchronous calls are under way, behind them."""
        # Not the lock that a call holds while it waits for its peers: a handle is given at once.
        with self._queue_lock:
            self._refuse_foreign()
            if self._last_work is not None and self._last_work.done():
                self._last_work = None
            behind = async_op or self._last_work is not None
            work = self._submit(self._with_modes(run)) if behind else None
        if work is None:
            return self._call(run)
        return work if async_op else work.wait()

    def _with_modes(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """`run` in the autograd modes and on the CUDA stream of this moment, which another thread lacks."""
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

        def in_modes() -> Any:
            on_stream = contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)
            with on_stream, torch.inference_mode(inference), torch.set_grad_enabled(grad):
                return self._call(run)

        return in_modes

    def _call(self, run: Callable[[], Any]) -> Any:
        with self._lock, self._whole():
            self._refuse_foreign()
            return run()

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """Around a call: what breaks it off in the middle leaves this rank out of step, so it is the last."""
        try:
            yield
        except TcommError:
            raise
        except BaseException:
            if self._arena is not None:
                self._arena.channel.interrupt()
            raise

    def _forget_plans(self) -> None:
        self._plans.clear()
        self._repeats.clear()

    def _seconds(self, timeout: Timeout | Unset) -> float | None:
        return self.timeout if isinstance(timeout, Unset) else resolve_timeout(timeout)

    def _refuse_foreign(self) -> None:
        if self._foreign:
            raise GroupClosedError(
                f"group {self.name!r} cannot be used: {self._foreign}", group=self.name, rank=self.rank
            )

    def _choose(self, request: Request, algorithm: str) -> Decision:
        """The decision for a call: by what it asks for, by the environment, or by the table."""
        request = dataclasses.replace(request, deterministic=self.config.deterministic)
        return decide(request, self.capabilities, self.table, algorithm, self.config.algorithm)

    def _open_device(self, device: torch.device, call: CallDescription, seconds: float | None) -> None:
        """Before the first choice on a GPU: make memory there, and know the topology. **Collective.**"""
        if device.type == "cuda" and self.capabilities.topology is None and self.world_size > 1:
            topology = self._devices.open(device, call, self._agreement, seconds)
            self.capabilities = dataclasses.replace(self.capabilities, topology=topology)

    def synchronize(self) -> None:
        """Wait until this rank's GPU has done all that it was given, and raise what calls found.

        Not collective. On a CPU every call has raised what it found.

        Raises:
            CapabilityError: while a graph is captured.
            CollectiveMismatchError: the ranks called different things; the group stays usable.
            PeerLostError, PeerTimeoutError: a peer did not come; the group is given up.
        """
        self._refuse_foreign()
        if self._devices.arena is not None:
            self._devices.arena.channel.synchronize()

    def check_peers(self) -> None:
        """Raise what a call would when a peer is known to be dead or gone. Not collective.

        Raises:
            PeerLostError: naming it; the group is given up.
        """
        self._refuse_foreign()
        if self._arena is not None:
            self._arena.channel.refuse_the_lost()

    def _explain_delay(self, told: str) -> PeerTimeoutError:
        waiting: list[int] = []
        if self._arena is not None and (word := self._arena.channel.words[Word.WAITING_FOR]):
            waiting = [word - 1]
            told += f"; {self._arena.channel.blame(word - 1)}"
        return PeerTimeoutError(
            f"collective of group {self.name!r} is {told}", group=self.name, rank=self.rank, peers=waiting
        )

    def close(self) -> None:
        """Leave the group and give its memory back. Not collective; may be called twice.

        A collective in flight on this rank is completed first. Peers that call another one are told that
        this rank left.
        """
        self._close("it closed the group")

    def _close(self, reason: str) -> None:
        if self._executor is not None and not self._foreign:
            self._executor.shutdown()
        with self._lock:
            if self._foreign:
                return
            self._foreign = "it was closed"
            self._forget_plans()
            self._transfers.clear()
            # Whoever else holds the process group decides when it ends, and not a forgotten communicator.
            self._fallback = None
            del self._agreement, self._planner, self._members
            # Kernels in flight may need host memory still: it tells them of peers that are gone.
            self._devices.close(reason)
            if self._arena is not None:
                self._arena.close(reason)
        _open.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close("it closed the group" if error is None else f"{type(error).__name__}: {error}")

    def __repr__(self) -> str:
        memory = "shared memory" if self._arena is not None else "torch.distributed"
        return f"<Communicator {self.name!r} rank {self.rank} of {self.world_size} over {memory}>"
