"""The communicator: one group's collectives, each by the algorithm that the group agreed on."""

from __future__ import annotations

import functools
import logging
from typing import Literal, Self, overload

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tcomm.algorithms import reduce_op_name
from tcomm.errors import ConfigError
from tcomm.groups.arguments import UNSET, Timeout, Unset, check_out, check_tensor, refuse_integer_average
from tcomm.groups.handle import SETUP_SECONDS
from tcomm.groups.plans import Plan
from tcomm.groups.point_to_point import PointToPoint
from tcomm.groups.setup import from_process_group, from_store
from tcomm.groups.verbs import FallbackVerbs
from tcomm.groups.work import Work
from tcomm.memory.exchange import Store
from tcomm.memory.layout import StagingLayout
from tcomm.signature import CallDescription
from tcomm.tuning.choose import Decision, Request, choose

__all__ = ["Communicator"]

logger = logging.getLogger("tcomm")


class Communicator(FallbackVerbs, PointToPoint):
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
                plan, nbytes, shape, dtype = self._plans[op, algorithm, x.dtype, x.shape, x.is_cpu, x.layout]
            except (KeyError, AttributeError, TypeError):
                plan, nbytes, shape, dtype = self._plan(x, out, op, algorithm, seconds)
            if out is None:
                out = self._new_like(x)
            elif out is not x and not (
                # Like x and, being contiguous and this far away, apart from it.
                type(out) is torch.Tensor
                and out.shape == shape
                and out.dtype is dtype
                and out.is_cpu
                and not (out.requires_grad or out.is_inference())
                and abs(out.data_ptr() - x.data_ptr()) >= nbytes
            ):
                check_out("all_reduce", x, out, x.shape)
            if x.requires_grad or type(x) is not torch.Tensor:
                check_tensor("all_reduce", x, self.world_size > 1)
            # A negated view is a flag on a tensor of the opposite sign.
            if x.is_contiguous() and out.is_contiguous() and not (x.is_neg() or out.is_neg()):
                try:
                    plan(x, out, seconds)
                except BaseException:
                    with self._whole():
                        raise
                return out
            return self._strided(plan, x, out, seconds)

    def _strided(self, plan: Plan, x: torch.Tensor, out: torch.Tensor, seconds: float | None) -> torch.Tensor:
        """Reduce by way of a dense copy."""
        if out is not x:
            check_out("all_reduce", x, out, x.shape)
        dense = self._new_like(x).copy_(x)
        with self._whole():
            plan(dense, dense, seconds)
        return out.copy_(dense)

    def _plan(
        self,
        x: torch.Tensor,
        out: torch.Tensor | None,
        op: object,
        algorithm: str,
        seconds: float | None,
    ) -> tuple[Plan, int, torch.Size, torch.dtype]:
        """Check a call of a new kind, make the plan for its kind, and keep it."""
        check_tensor("all_reduce", x, self.world_size > 1)
        if out is not None:
            check_out("all_reduce", x, out, x.shape)
        reduce = reduce_op_name(op)
        refuse_integer_average(reduce, x.dtype)
        decision = self._decide(x, reduce, algorithm)
        # Tensors made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            plan = self._planner.plan_all_reduce(decision, x.shape, seconds)
        if len(self._plans) >= _MAX_PLANS:
            self._plans.clear()
        made = plan, x.numel() * x.itemsize, x.shape, x.dtype
        self._plans[op, algorithm, x.dtype, x.shape, x.is_cpu, x.layout] = made
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

        It is never made smaller than TCOMM_STAGING_BYTES.

        Memory that somebody still holds stays as it is; addresses never change under anybody's hands.

        Raises:
            ConfigError: when max_nbytes is not positive.
            CapabilityError: on every rank, when there is too little shared memory; the old staging stays.
        """
        if not isinstance(max_nbytes, int) or not 0 < max_nbytes < _MAX_PREPARED_BYTES:
            raise ConfigError(f"max_nbytes={max_nbytes!r} is not a positive number of bytes")
        call = CallDescription("prepare", shape=(max_nbytes,))
        seconds = self._seconds(timeout)
        nbytes = max(StagingLayout.for_message(max_nbytes, self.world_size), self.config.staging_bytes)

        def run() -> torch.Tensor:
            self._agreement.agree(call, seconds)
            if self._arena is not None:
                with torch.inference_mode(False):
                    self._arena.grow(nbytes, SETUP_SECONDS)
                self._plans.clear()
            return torch.empty(0)

        self._in_order(run, False)


_MAX_PLANS = 1024
_MAX_PREPARED_BYTES = 1 << 40
_CHOSEN_VERBS = ("all_reduce",)
