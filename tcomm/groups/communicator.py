"""The communicator: one group's collectives, each by the algorithm that the group agreed on."""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import os
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Self, overload

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tcomm.algorithms import reduce_op_name
from tcomm.config import Config, resolve_timeout
from tcomm.errors import CapabilityError, ConfigError, GroupClosedError, PeerTimeoutError
from tcomm.groups.agreement import Agreement, LocalAgreement, RemoteAgreement, SharedAgreement
from tcomm.groups.arguments import UNSET, Timeout, Unset, check_out, check_tensor
from tcomm.groups.fallback import TorchFallback
from tcomm.groups.plans import Plan, PlanKey, Planner
from tcomm.groups.pool import ResultPool
from tcomm.groups.setup import Membership, agree_on_settings, from_process_group, from_store
from tcomm.groups.verbs import FallbackVerbs
from tcomm.groups.work import Work
from tcomm.memory.arena import Arena, open_arena
from tcomm.memory.base import NotShared
from tcomm.memory.control import Word
from tcomm.memory.exchange import Store
from tcomm.memory.layout import StagingLayout
from tcomm.signature import CallDescription
from tcomm.tuning.choose import Capabilities, Decision, Request, choose

__all__ = ["Communicator"]

logger = logging.getLogger("tcomm")

_SETUP_SECONDS = 120.0
_SPINS_WITH_A_CORE_EACH = 200
_SPINS_OTHERWISE = 20


_open: weakref.WeakSet[Communicator] = weakref.WeakSet()


def _after_fork() -> None:
    for communicator in list(_open):
        communicator._foreign = f"the group belongs to process {os.getppid()}, from which this one was forked"


os.register_at_fork(after_in_child=_after_fork)


class Communicator(FallbackVerbs):
    """Collectives of one group of ranks. **Collective** to create.

    One order of calls: every rank makes the same calls in the same order. Calls from several threads of a
    rank are serialised in the order in which they get the lock. After a fork, only the parent may use it.

    Args:
        group: a process group, a one-dimensional DeviceMesh such as `mesh["tp"]`, or None for the default
            group, or for this process alone where there is none.
        name: for errors and logs; the same on every rank.
        timeout: for calls that give none: seconds, a profile (`default` 120 s, `ml_inference` 600 s,
            `streaming` 1800 s, `batch_job` as long as the peers live) or None, which is `batch_job`.

    Raises:
        ConfigError: when an argument or a TCOMM_ variable is wrong.
        CapabilityError: when there is too little shared memory; says needed and available.
        RendezvousError: when a rank did not come; names it. GroupMismatchError: when settings differ.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        *,
        name: str = "",
        timeout: Timeout | Unset = UNSET,
    ) -> None:
        self._start(from_process_group(group, name), timeout)

    @classmethod
    def from_store(
        cls,
        store: Store,
        rank: int,
        world_size: int,
        *,
        name: str = "group",
        timeout: Timeout | Unset = UNSET,
    ) -> Self:
        """A communicator without a process group, and so with nothing to fall back to. **Collective.**

        Raises:
            ConfigError, CapabilityError, RendezvousError: as the constructor does.
        """
        communicator = cls.__new__(cls)
        communicator._start(from_store(store, rank, world_size, name), timeout)
        return communicator

    def _start(self, members: Membership, timeout: Timeout | Unset) -> None:
        self.config = Config.from_environment()
        self.name = members.name
        self.rank = members.exchange.rank
        self.world_size = members.exchange.world_size
        self.global_ranks = members.global_ranks
        self.timeout = resolve_timeout(self.config.timeout if isinstance(timeout, Unset) else timeout)
        self._members = members
        self._lock = threading.RLock()
        self._foreign = ""
        self._executor: concurrent.futures.ThreadPoolExecutor | None = None
        self._last_work: concurrent.futures.Future[torch.Tensor] | None = None
        self._pool = ResultPool()
        self.table, no_kernels = agree_on_settings(members, self.config, _SETUP_SECONDS)
        self._arena, no_shared_memory = self._open_arena()
        self._fallback = self._make_fallback()
        self._agreement = self._make_agreement()
        self.capabilities = Capabilities(
            no_shared_memory=no_shared_memory,
            no_kernels=no_kernels,
            torch_backends=self._fallback.backends if self._fallback else (),
        )
        self._planner = Planner(
            self.name, self.config, self._arena, self._fallback, self._agreement, _SETUP_SECONDS
        )
        self._plans: dict[PlanKey, tuple[Plan, int]] = {}
        _open.add(self)

    def _open_arena(self) -> tuple[Arena | None, str]:
        if self.world_size == 1:
            return None, "a world of one needs no shared memory"
        cores = len(os.sched_getaffinity(0))
        spins = self.config.spins or (
            _SPINS_WITH_A_CORE_EACH if self.world_size <= cores else _SPINS_OTHERWISE
        )
        exchange = self._members.exchange
        made = open_arena(self.name, exchange, self.config.shm_dir, spins, _SETUP_SECONDS)
        if isinstance(made, NotShared):
            logger.info("group %r uses torch.distributed: %s", self.name, made.reason)
            return None, made.reason
        return made, ""

    def _make_fallback(self) -> TorchFallback | None:
        group = self._members.process_group
        return None if group is None else TorchFallback(self.name, group, self._find_dead)

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

    def _find_dead(self) -> tuple[list[int], str]:
        if self._arena is None:
            return [], ""
        channel = self._arena.channel
        dead = [
            peer
            for peer in channel.peers
            if channel.pages[peer].words[Word.LEFT] or ((w := channel.processes[peer]) and w.is_dead())
        ]
        return dead, "; ".join(channel.blame(peer) for peer in dead)

    # The collective of this file -----------------------------------------------------------------

    @overload
    def all_reduce(
        self,
        x: torch.Tensor,
        op: object = "sum",
        *,
        out: torch.Tensor | None = None,
        timeout: Timeout | Unset = UNSET,
        async_op: Literal[False] = False,
        algorithm: str = "",
    ) -> torch.Tensor: ...

    @overload
    def all_reduce(
        self,
        x: torch.Tensor,
        op: object = "sum",
        *,
        out: torch.Tensor | None = None,
        timeout: Timeout | Unset = UNSET,
        async_op: Literal[True],
        algorithm: str = "",
    ) -> Work: ...

    def all_reduce(
        self,
        x: torch.Tensor,
        op: object = "sum",
        *,
        out: torch.Tensor | None = None,
        timeout: Timeout | Unset = UNSET,
        async_op: bool = False,
        algorithm: str = "",
    ) -> torch.Tensor | Work:
        """Reduce x over the ranks, the same bits on every rank. **Collective.**

        Meaning: `tcomm.reference.all_reduce`. The algorithm is that of `explain`.

        Args:
            x: any shape and stride, 0-d and empty included; not modified unless it is `out`.
            op: `sum`, `avg`, `max`, `min`, or a `torch.distributed.ReduceOp`.
            out: where the result goes, of the shape and dtype of x; may be x.
            timeout: seconds, a profile, or None: as long as the peers live.
            async_op: return a `Work` at once; x and out belong to it until it is complete.
            algorithm: engine, algorithm or `engine:algorithm` that must be used, on every rank.

        Returns:
            `out`, or a tensor like x; with `async_op`, a `Work` that gives it.

        Raises:
            ConfigError: on this rank only, when an argument is wrong; nothing was sent.
            CapabilityError: when the algorithm that is asked for cannot do it.
            CollectiveMismatchError: on every rank, when they call different things; the group stays usable.
            PeerLostError, PeerTimeoutError: when a peer does not come; the group is given up.
            GroupClosedError: when the group is closed or belongs to another process.
        """
        if async_op or self._last_work is not None:
            run = functools.partial(self._all_reduce, x, op, out, timeout, algorithm)
            return self._in_order(run, async_op)
        return self._all_reduce(x, op, out, timeout, algorithm)

    def _all_reduce(
        self,
        x: torch.Tensor,
        op: object,
        out: torch.Tensor | None,
        timeout: Timeout | Unset,
        algorithm: str,
    ) -> torch.Tensor:
        # The hot path of small messages: every line here is a tenth of a microsecond.
        with self._lock:
            if self._foreign:
                self._refuse_foreign()
            seconds = self.timeout if timeout is UNSET else self._seconds(timeout)
            try:
                plan, nbytes = self._plans[op, algorithm, x.dtype, x.shape, x.is_cpu]
            except (KeyError, AttributeError, TypeError):
                plan, nbytes = self._plan(x, out, op, algorithm, seconds)
            if out is None:
                out = self._new_like(x)
            elif out is not x and not _is_apart(x, out, nbytes):
                check_out("all_reduce", x, out, x.shape)
            if x.requires_grad:
                check_tensor("all_reduce", x, self.world_size > 1)
            if x.is_contiguous() and out.is_contiguous():
                plan(x, out, seconds)
                return out
            if out is not x:
                check_out("all_reduce", x, out, x.shape)
            dense = self._new_like(x).copy_(x)
            plan(dense, dense, seconds)
            return out.copy_(dense)

    def _plan(
        self,
        x: torch.Tensor,
        out: torch.Tensor | None,
        op: object,
        algorithm: str,
        seconds: float | None,
    ) -> tuple[Plan, int]:
        """Check a call of a new kind, make the plan for its kind, and keep it."""
        check_tensor("all_reduce", x, self.world_size > 1)
        if out is not None:
            check_out("all_reduce", x, out, x.shape)
        decision = self._decide(x, reduce_op_name(op), algorithm)
        made = self._planner.plan_all_reduce(decision, x.shape, seconds), x.numel() * x.itemsize
        self._plans[op, algorithm, x.dtype, x.shape, x.is_cpu] = made
        return made

    def _new_like(self, x: torch.Tensor) -> torch.Tensor:
        """A contiguous tensor of the shape, dtype and device of x."""
        if x.is_cpu:
            return self._pool.take(x.shape, x.dtype)
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    # Choosing ------------------------------------------------------------------------------------

    def explain(
        self,
        verb: str,
        *,
        nbytes: int,
        dtype: torch.dtype = torch.float32,
        op: object = "sum",
        device: str = "cpu",
        algorithm: str = "",
    ) -> Decision:
        """The decision for such a call, and why every other algorithm was rejected. Not collective.

        Args:
            verb: `all_reduce`.
            nbytes: bytes of one rank's input.
            dtype: element type.
            op: reduce operation.
            device: device type of the tensors.
            algorithm: as given to the collective.

        Raises:
            CapabilityError: when the collective would raise it.
            ConfigError: when the verb is unknown or nbytes negative.
        """
        if verb not in _CHOSEN_VERBS:
            raise ConfigError(f"{verb!r} is not among {', '.join(_CHOSEN_VERBS)}")
        if nbytes < 0:
            raise ConfigError(f"nbytes={nbytes} is negative")
        reduce = reduce_op_name(op)
        request = Request(verb, reduce, dtype, nbytes, self.world_size, device)
        return choose(request, self.capabilities, self.table, algorithm or self.config.algorithm)

    def _decide(self, x: torch.Tensor, op: str, algorithm: str) -> Decision:
        nbytes = x.numel() * x.itemsize
        return self.explain(
            "all_reduce", nbytes=nbytes, dtype=x.dtype, op=op, device=x.device.type, algorithm=algorithm
        )

    def prepare(self, max_nbytes: int, timeout: Timeout | Unset = UNSET) -> None:
        """Make staging in which a message of `max_nbytes` goes in one piece. **Collective.**

        Memory that somebody still holds stays as it is; addresses never change under anybody's hands.

        Raises:
            ConfigError: when max_nbytes is not positive.
            CapabilityError: on every rank, when there is too little shared memory; the old staging stays.
        """
        if max_nbytes <= 0:
            raise ConfigError(f"max_nbytes={max_nbytes} is not positive")
        with self._lock:
            self._refuse_foreign()
            call = CallDescription("prepare", shape=(max_nbytes,))
            seconds = self._seconds(timeout)
            self._agreement.agree(call, seconds)
            if self._arena is None:
                return
            nbytes = max(StagingLayout.for_message(max_nbytes, self.world_size), self.config.staging_bytes)
            self._arena.grow(nbytes, _SETUP_SECONDS)
            self._plans.clear()

    # Life ----------------------------------------------------------------------------------------

    def _submit(self, run: Callable[[], torch.Tensor]) -> Work:
        """Run behind the caller's back, after everything that was submitted before."""
        if self._executor is None:
            self._executor = concurrent.futures.ThreadPoolExecutor(1, f"tcomm-{self.name}")
        self._last_work = self._executor.submit(run)
        return Work(self._last_work, self._explain_delay)

    def _in_order(self, run: Callable[[], torch.Tensor], async_op: bool) -> torch.Tensor | Work:
        """Run now, or where asynchronous calls are under way, behind them."""
        with self._lock:
            self._refuse_foreign()
            if self._last_work is not None and self._last_work.done():
                self._last_work = None
            if not async_op and self._last_work is None:
                return run()
            work = self._submit(run)
        return work if async_op else work.wait()

    def _seconds(self, timeout: Timeout | Unset) -> float | None:
        return self.timeout if isinstance(timeout, Unset) else resolve_timeout(timeout)

    def _refuse_foreign(self) -> None:
        if self._foreign:
            raise GroupClosedError(
                f"group {self.name!r} cannot be used: {self._foreign}", group=self.name, rank=self.rank
            )

    def _explain_delay(self, told: str) -> PeerTimeoutError:
        waiting: list[int] = []
        if self._arena is not None and (word := self._arena.channel.words[Word.WAITING_FOR]):
            waiting = [word - 1]
            told += f"; waiting for {self._arena.channel.blame(word - 1)}"
        return PeerTimeoutError(
            f"collective of group {self.name!r} is {told}", group=self.name, rank=self.rank, peers=waiting
        )

    def close(self) -> None:
        """Leave the group and give its memory back. Not collective; may be called twice.

        A collective in flight on this rank is completed first. Peers that call another one are told that
        this rank left.
        """
        if self._foreign:
            return
        if self._executor is not None:
            self._executor.shutdown()
        with self._lock:
            self._foreign = self._foreign or "it was closed"
            self._plans.clear()
            if self._arena is not None:
                self._arena.close("it closed the group")
        _open.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        memory = "shared memory" if self._arena is not None else "torch.distributed"
        return f"<Communicator {self.name!r} rank {self.rank} of {self.world_size} over {memory}>"


def _is_apart(x: torch.Tensor, out: torch.Tensor, nbytes: int) -> bool:
    """Whether out is like x and elsewhere, without a doubt; for contiguous tensors on the CPU."""
    return (
        type(out) is torch.Tensor
        and out.shape == x.shape
        and out.dtype is x.dtype
        and out.is_cpu
        and abs(out.data_ptr() - x.data_ptr()) >= nbytes
    )


_CHOSEN_VERBS = ("all_reduce",)
