"""How every verb runs: look its plan up, check the tensors, call the plan."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any, TypedDict

import msgspec
import torch

from tcomm.errors import CapabilityError
from tcomm.groups.arguments import (
    UNSET,
    Timeout,
    Unset,
    check_out,
    check_tensor,
    is_flat_memory,
    is_ordinary,
    is_plain,
    refuse_tracers,
)
from tcomm.groups.handle import GroupHandle
from tcomm.groups.jobs import JOBS, Caller, Job
from tcomm.groups.plans import Plan
from tcomm.groups.repeats import Ready, Repeat, find_repeat, make_repeat
from tcomm.tuning.choose import Decision, Request, is_direct, make_request

__all__ = ["CallOptions", "Collective"]

_MAX_PLANS = 1024


class CallOptions(TypedDict, total=False):
    """What every verb takes besides its own arguments; the verbs' docstrings say what they mean."""

    out: torch.Tensor | None
    timeout: Timeout | Unset
    algorithm: str


class Collective(GroupHandle):
    """Runs verbs by name. What is collective here is so because its verb is."""

    def _collect(
        self,
        verb: str,
        args: tuple[object, ...],
        x: torch.Tensor,
        out: torch.Tensor | None,
        timeout: Timeout | Unset,
        async_op: bool,
        algorithm: str,
        contents: str = "",
    ) -> Any:
        """Run `verb`, now or behind what is under way. **Collective.**

        Args:
            verb: a key of `JOBS`.
            args: its own arguments, hashable where the plan is to be kept.
            x: input.
            out: where the result goes; a new tensor where None.
            timeout: seconds, a profile, or None: as long as the peers live.
            async_op: return a `Work`.
            algorithm: engine, algorithm or both that must be used.
            contents: of x, where several tensors travel in it.

        Returns:
            The result, None on a rank that gets none; with `async_op` a `Work`.
        """
        if async_op or self._last_work is not None:
            run = functools.partial(self._run, verb, args, x, out, timeout, algorithm, contents)
            return self._in_order(run, async_op)
        # The hot path of small messages: every line is a tenth of a microsecond.
        with self._lock:
            try:
                known = self._repeats.get((verb, args, algorithm, contents, x.numel()))
                if known is not None and (
                    not known.fits(x, out)
                    or self._foreign
                    or not (self._regions.is_empty or known.place == self._regions.find_name(out))
                ):
                    known = None
            except (AttributeError, TypeError, RuntimeError):
                known = None
            if known is None:
                return self._run(verb, args, x, out, timeout, algorithm, contents)
            return self._repeat(known, x, out, self.timeout if timeout is UNSET else self._seconds(timeout))

    def _repeat(
        self, repeat: Repeat, x: torch.Tensor, out: torch.Tensor | None, seconds: float | None
    ) -> torch.Tensor:
        """Run what fits."""
        if out is None:
            out = torch.empty_like(x) if repeat.shape is None else self._new(repeat.shape, x)
        try:
            repeat.plan(x, out, seconds)
        except BaseException:
            with self._whole():
                raise
        return out

    def _run(
        self,
        verb: str,
        args: tuple[object, ...],
        x: torch.Tensor,
        out: torch.Tensor | None,
        timeout: Timeout | Unset,
        algorithm: str,
        contents: str = "",
    ) -> Any:
        """Run a call that may differ from the last one. The lock is held."""
        self._refuse_foreign()
        seconds, key = self._seconds(timeout), (verb, args, algorithm, contents)
        if not self._regions.is_empty:
            contents = self._name_place(verb, out, contents)
        try:
            ready = self._plans[verb, args, algorithm, contents, x.dtype, x.shape, x.is_cpu, x.layout]
        except (KeyError, AttributeError, TypeError, RuntimeError):
            ready = self._prepare(verb, args, x, out, algorithm, contents, seconds)
        plan, shape = ready.plan, ready.shape
        repeat = find_repeat(ready.repeats, x, out, self._regions)
        if repeat is None:
            if not is_ordinary(x):
                check_tensor(verb, x, self.world_size > 1)
            if out is not None and shape is not None:
                check_out(verb, x, out, shape, ready.may_alias)
            repeat = make_repeat(ready, x, out, self._regions)
        if repeat is not None:
            # What cannot be hashed is planned at every call.
            with contextlib.suppress(TypeError):
                self._repeats[*key, x.numel()] = repeat
            return self._repeat(repeat, x, out, seconds)
        if shape is None:
            return self._run_densely(plan, x, None, seconds)
        return self._run_densely(plan, x, self._new(shape, x) if out is None else out, seconds)

    def _name_place(self, verb: str, out: torch.Tensor | None, contents: str) -> str:
        """What ranks call the place of an all-reduce's result in symmetric memory; else the contents of x."""
        # By its memory alone: what else matters is checked later, and may be of this moment and this rank.
        if contents or verb != "all_reduce" or out is None or not is_flat_memory(out):
            return contents
        return self._regions.name(out)

    def _run_densely(
        self, plan: Plan, x: torch.Tensor, out: torch.Tensor | None, seconds: float | None
    ) -> torch.Tensor | None:
        """Run by way of contiguous copies of what is not; `out` is None on a rank that gets no result."""
        dense = x if is_plain(x) else self._new(x.shape, x).copy_(x)
        result = dense
        if out is not None and out is not x:
            result = out if is_plain(out) else self._new(out.shape, x)
        with self._whole():
            plan(dense, result, seconds)
        return out if out is None or result is out else out.copy_(result)

    def _prepare(
        self,
        verb: str,
        args: tuple[object, ...],
        x: torch.Tensor,
        out: torch.Tensor | None,
        algorithm: str,
        contents: str,
        seconds: float | None,
    ) -> Ready:
        """Check a call of a new kind, make the plan for its kind, and keep it."""
        check_tensor(verb, x, self.world_size > 1)
        job = JOBS[verb](Caller(self.rank, self.world_size, x.shape, x.dtype), *args)
        if contents:
            job = dataclasses.replace(job, call=msgspec.structs.replace(job.call, contents=contents))
        if out is not None and job.shape is not None:
            check_out(verb, x, out, job.shape, job.may_alias)
        self._open_device(x.device, job.call, seconds)
        decision = self._decide_together(job, x.device.type, algorithm, seconds)
        if decision.request.symmetric and not decision.is_direct:
            job = dataclasses.replace(job, call=msgspec.structs.replace(job.call, contents=""))
        # Tensors made in inference mode could not be written outside of it.
        with self._whole(), torch.inference_mode(False):
            plan = self._planner.plan(job, decision, seconds, self._pool)
        if x.dim() == 0:
            # Any other tensor has sizes of its own while torch.jit traces it, and is checked here every time.
            plan = _untraced(verb, plan)
        if len(self._plans) >= _MAX_PLANS:
            self._forget_plans()
        reach = max(x.numel(), job.shape.numel() if job.shape is not None else 0) * x.itemsize
        ready = Ready(plan, job.shape, reach, job.may_alias, [])
        # What cannot be hashed is planned at every call.
        with contextlib.suppress(TypeError):
            self._plans[verb, args, algorithm, contents, x.dtype, x.shape, x.is_cpu, x.layout] = ready
        return ready

    def _refuse_algorithm(self, verb: str, x: torch.Tensor, algorithm: str) -> None:
        """Raise what the choice would, before the ranks have told one another anything."""
        if x.is_cuda and self.capabilities.topology is None:
            return  # what the GPUs can do is found out by the call itself, together
        if algorithm or not x.is_cpu:
            self.explain(verb, dtype=x.dtype, device=x.device.type, algorithm=algorithm)

    def _new(self, shape: torch.Size, x: torch.Tensor) -> torch.Tensor:
        """A contiguous tensor of `shape`, otherwise like x."""
        if x.is_cpu:
            return self._pool.take(shape, x.dtype)
        return torch.empty(shape, dtype=x.dtype, device=x.device)

    def explain(
        self,
        verb: str,
        *,
        nbytes: int = 0,
        dtype: torch.dtype = torch.float32,
        op: object = "sum",
        device: str = "cpu",
        algorithm: str = "",
        symmetric: bool = False,
    ) -> Decision:
        """The decision for such a call, and why every other algorithm was rejected. Not collective.

        Args:
            verb: name of a collective method, such as `all_gather_single`.
            nbytes: bytes as nccl-tests counts them: the message where all ranks have the whole of it
                (all_reduce, broadcast, reduce), one rank's input of an all-to-all, and the whole where each
                rank holds a part of it: all_gather's output, reduce_scatter's input.
            dtype: element type.
            op: reduce operation, for verbs that reduce.
            device: device type of the tensors.
            algorithm: as given to the collective.
            symmetric: whether `out` is a tensor of `symmetric_empty`.

        Raises:
            CapabilityError: when the collective would raise it.
            ConfigError: when the verb is unknown or nbytes negative.
        """
        request = make_request(verb, op, dtype, nbytes, self.world_size, device, symmetric=symmetric)
        return self._choose(request, algorithm)

    def _decide_together(self, job: Job, device: str, algorithm: str, seconds: float | None) -> Decision:
        """As `_decide`. Where a result is, is no secret of a rank: a refusal for it is every rank's error."""
        try:
            return self._decide(job, device, algorithm)
        except CapabilityError:
            forced = algorithm or self.config.algorithm
            if is_direct(job.call.op, forced):
                self._agreement.agree(msgspec.structs.replace(job.call, algorithm=forced), seconds)
            raise

    def _decide(self, job: Job, device: str, algorithm: str) -> Decision:
        is_symmetric = self._regions.find(job.call.contents) is not None
        return self._choose(
            Request(
                job.call.op,
                job.call.reduce,
                job.dtype,
                job.nbytes,
                self.world_size,
                device,
                symmetric=is_symmetric,
            ),
            algorithm,
        )


def _untraced(verb: str, plan: Plan) -> Plan:
    """`plan`, for tensors whose kind does not tell that torch.jit traces them."""

    def run(x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
        refuse_tracers(verb)
        plan(x, out, timeout)

    return run
