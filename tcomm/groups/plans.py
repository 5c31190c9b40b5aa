"""From a decision to something that can be called again and again."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from tcomm.config import Config
from tcomm.cpu.all_reduce import make_plan
from tcomm.groups.agreement import Agreement
from tcomm.groups.arguments import dtype_name
from tcomm.groups.fallback import TorchFallback
from tcomm.memory.arena import Arena
from tcomm.signature import CallDescription
from tcomm.tuning.choose import Decision

__all__ = ["Plan", "PlanKey", "Planner"]

logger = logging.getLogger("tcomm")

Plan = Callable[[torch.Tensor, torch.Tensor, "float | None"], object]
"""Takes contiguous x and out (which may be x) and the timeout in seconds. **Collective.**"""
PlanKey = tuple[object, str, torch.dtype, torch.Size, bool, torch.layout]
"""What a plan is made for: op as given, algorithm as given, dtype, shape, whether on the CPU, layout."""


class Planner:
    """Makes plans for one group, and its staging memory when the first of them needs it."""

    def __init__(
        self,
        group: str,
        config: Config,
        arena: Arena | None,
        fallback: TorchFallback | None,
        agreement: Agreement,
        setup_seconds: float,
    ) -> None:
        self._group = group
        self._config = config
        self._arena = arena
        self._fallback = fallback
        self._agreement = agreement
        self._setup_seconds = setup_seconds
        self._logged: set[str] = set()

    def plan_all_reduce(self, decision: Decision, shape: torch.Size, seconds: float | None) -> Plan:
        """The plan for all-reduces of `shape` by `decision`. **Collective** when staging has to be made.

        Raises:
            CollectiveMismatchError: when the first collectives of the ranks differ.
            CapabilityError: when there is too little memory for staging.
        """
        asked = decision.request
        call = CallDescription(
            asked.op, dtype_name(asked.dtype), tuple(shape), asked.reduce, algorithm=decision.algorithm
        )
        if decision.engine == "torch":
            return self._plan_fallback(decision, call)
        if decision.engine == "local":
            return lambda x, out, _: out if out is x else out.copy_(x)
        arena = self._arena_with_staging(call, seconds)
        algorithm = decision.algorithm.partition(":")[2]
        if decision.engine == "triton":
            # Triton costs most of a second to import, and must not be imported before it is asked for.
            from tcomm.kernels.all_reduce import LAUNCHERS

            launcher, reduce = LAUNCHERS[algorithm], asked.reduce

            def run_kernel(x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
                launcher(x, arena, reduce, out=out, timeout=timeout, call=call)

            return run_kernel
        return make_plan(algorithm, arena, call, asked.reduce, asked.dtype, shape, decision.piece_nbytes)

    def _plan_fallback(self, decision: Decision, call: CallDescription) -> Plan:
        fallback, agreement, reduce = self._fallback, self._agreement, decision.request.reduce
        if fallback is None:
            raise AssertionError("torch was chosen without a process group")
        if decision.reason not in self._logged:
            self._logged.add(decision.reason)
            logger.info(
                "group %r: %s goes to %s: %s", self._group, call.op, decision.algorithm, decision.reason
            )

        def run_fallback(x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
            agreement.agree(call, timeout)
            fallback.all_reduce(x, out, reduce, timeout)

        return run_fallback

    def _arena_with_staging(self, call: CallDescription, seconds: float | None) -> Arena:
        """The arena; its staging is made at the group's first collective, once the ranks agree on that."""
        arena = self._arena
        if arena is None:
            raise AssertionError("an algorithm in shared memory was chosen without any")
        if arena.staging is None:
            self._agreement.agree(call, seconds)
            arena.grow(self._config.staging_bytes, self._setup_seconds)
        return arena
