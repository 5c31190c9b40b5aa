"""From a decision to something that can be called again and again."""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec
import torch

from tcomm.config import Config
from tcomm.cpu.all_reduce import make_plan
from tcomm.cpu.direct import make_direct_plan
from tcomm.cpu.exchange import make_exchange_plan
from tcomm.cpu.reduce_scatter import make_reduce_scatter_plan
from tcomm.groups.agreement import Agreement
from tcomm.groups.devices import DeviceMemory
from tcomm.groups.fallback import TorchFallback
from tcomm.groups.jobs import Job
from tcomm.groups.pool import ResultPool
from tcomm.groups.torch_verbs import make_torch_plan
from tcomm.memory.arena import Arena
from tcomm.memory.base import KernelArena
from tcomm.memory.device_arena import DeviceArena
from tcomm.signature import CallDescription
from tcomm.tuning.choose import Decision

__all__ = ["Plan", "PlanKey", "Planner"]

logger = logging.getLogger("tcomm")

Plan = Callable[[torch.Tensor, torch.Tensor, "float | None"], object]
"""Takes contiguous x and out (which may be x where the job says so) and the timeout in seconds.
**Collective.** Writes nothing to the out of a rank that gets no result."""
PlanKey = tuple[str, tuple[object, ...], str, str, torch.dtype, torch.Size, bool, torch.layout]
"""What a plan is made for: verb, its arguments, contents and algorithm as given, and the kind of input."""


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
        devices: DeviceMemory | None = None,
    ) -> None:
        self._group = group
        self._config = config
        self._arena = arena
        self._devices = devices
        self._fallback = fallback
        self._agreement = agreement
        self._setup_seconds = setup_seconds
        self._logged: set[tuple[str, str]] = set()

    def plan(self, job: Job, decision: Decision, seconds: float | None, pool: ResultPool) -> Plan:
        """The plan for `job` by `decision`. **Collective** when staging has to be made.

        Args:
            job: what to do.
            decision: by which algorithm.
            seconds: timeout of the call that it is first made for.
            pool: where memory for parts that lie apart comes from.

        Raises:
            CollectiveMismatchError: when the first collectives of the ranks differ.
            CapabilityError: when there is too little memory for staging.
        """
        call = msgspec.structs.replace(job.call, algorithm=decision.algorithm)
        if decision.engine == "local":
            return _copy
        if decision.engine == "torch":
            return _with_chunks(job, self._plan_fallback(job, decision, call), pool)
        if decision.algorithm == "cpu:arrival":
            return self._plan_arrival(call)
        if decision.request.device == "cuda":
            return _with_chunks(job, self._plan_on_device(job, decision, call), pool)
        arena = self._arena_with_staging(call, seconds)
        algorithm = decision.algorithm.partition(":")[2]
        if (place := arena.regions.find(call.contents)) is not None:
            return make_direct_plan(
                arena, call, call.reduce, job.dtype, torch.Size(call.shape).numel(), place
            )
        make = _plan_kernel if decision.engine == "triton" else _plan_cpu
        return _with_chunks(job, make(job, algorithm, arena, call, decision.piece_nbytes), pool)

    def _plan_on_device(self, job: Job, decision: Decision, call: CallDescription) -> Plan:
        """Kernels on a GPU, launched in the order of its streams; what they find is raised as it is known."""
        from tcomm.kernels.bound import Rebound

        devices = self._devices
        arena = None if devices is None else devices.arena
        if devices is None or arena is None:
            raise AssertionError("an algorithm on GPUs was chosen without memory there")
        algorithm = decision.algorithm.partition(":")[2]
        if algorithm == "hierarchical":
            launch = Rebound(_plan_on_nodes(job, devices, arena, call))
        else:
            launch = Rebound(_plan_kernel(job, algorithm, arena, call, decision.piece_nbytes))

        def run(x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
            if x.device != arena.device:
                devices.refuse_device(x.device)
            launch(x, out, timeout)
            # Behind the whole call, so that the ranks stay in step whichever of them learns of it first.
            arena.channel.raise_recorded()

        return run

    def _plan_fallback(self, job: Job, decision: Decision, call: CallDescription) -> Plan:
        fallback, agreement = self._fallback, self._agreement
        if fallback is None:
            raise AssertionError("torch was chosen without a process group")
        # Reasons from a model or a table say microseconds, which differ from size to size.
        why = "speed" if decision.predicted_us or decision.measured_us else decision.reason
        if (call.op, why) not in self._logged:
            self._logged.add((call.op, why))
            logger.info(
                "group %r: %s goes to %s: %s", self._group, call.op, decision.algorithm, decision.reason
            )
        run = make_torch_plan(fallback, call, job.parts)

        def run_fallback(x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
            agreement.agree(call, timeout)
            run(x, out, timeout)

        return run_fallback

    def _plan_arrival(self, call: CallDescription) -> Plan:
        """A barrier of arrival words alone, which works where there is no room for staging."""
        if self._arena is None:
            raise AssertionError("an algorithm in shared memory was chosen without any")
        agree = self._arena.channel.agree
        return lambda _x, _out, timeout: agree(call, timeout)

    def _arena_with_staging(self, call: CallDescription, seconds: float | None) -> Arena:
        """The arena; its staging is made at the group's first collective, once the ranks agree on that."""
        arena = self._arena
        if arena is None:
            raise AssertionError("an algorithm in shared memory was chosen without any")
        if arena.staging is None:
            self._agreement.agree(call, seconds)
            arena.grow(self._config.staging_bytes, self._setup_seconds)
        return arena


def _copy(x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:  # noqa: ARG001
    """A world of one gives everything to itself."""
    if out is not x:
        out.view(-1).copy_(x.view(-1))


def _plan_cpu(job: Job, algorithm: str, arena: Arena, call: CallDescription, piece_nbytes: int) -> Plan:
    if job.parts is None:
        return make_plan(algorithm, arena, call, call.reduce, job.dtype, call.shape, piece_nbytes)
    if call.reduce:
        return make_reduce_scatter_plan(
            algorithm, arena, call, job.parts, call.reduce, job.dtype, piece_nbytes
        )
    return make_exchange_plan(algorithm, arena, call, job.parts, job.dtype.itemsize, piece_nbytes)


def _plan_kernel(
    job: Job, algorithm: str, arena: KernelArena, call: CallDescription, piece_nbytes: int
) -> Plan:
    # Triton costs most of a second to import, and must not be imported before it is asked for.
    from tcomm.kernels import all_reduce, barrier, exchange, multimem, reduce_scatter

    by_switch = multimem.LAUNCHERS
    parts, op = job.parts, call.reduce
    if call.op == "barrier":
        return lambda _x, _out, timeout: barrier.arrival_barrier(arena, timeout=timeout, call=call)
    if parts is None:
        launch = (all_reduce.LAUNCHERS | by_switch["all_reduce"])[algorithm]
        return lambda x, out, timeout: launch(x, arena, op, out=out, timeout=timeout, call=call)
    options = {"call": call, "piece_nbytes": piece_nbytes}
    if op:
        launch = (reduce_scatter.LAUNCHERS | by_switch["reduce_scatter"])[algorithm]
        return lambda x, out, timeout: launch(x, out, arena, parts, op, timeout=timeout, **options)
    launch = (exchange.LAUNCHERS | by_switch["all_gather"])[algorithm]
    return lambda x, out, timeout: launch(x, out, arena, parts, timeout=timeout, **options)


def _plan_on_nodes(job: Job, devices: DeviceMemory, arena: DeviceArena, call: CallDescription) -> Plan:
    from tcomm.kernels.hierarchical import hierarchical_all_gather, hierarchical_all_reduce

    if devices.topology is None or arena.nvshmem is None:
        raise AssertionError("an algorithm over nodes was chosen without NVSHMEM")
    nodes, pes, world = devices.topology.num_nodes, arena.nvshmem.pes, arena.world_size
    if job.parts is None:
        return lambda x, out, timeout: hierarchical_all_reduce(
            x, arena, nodes, call.reduce, out=out, pes=pes, timeout=timeout, call=call
        )

    def gather(x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
        rows = out.view(world, x.numel())
        hierarchical_all_gather(x.view(-1), arena, nodes, out=rows, pes=pes, timeout=timeout, call=call)

    return gather


def _with_chunks(job: Job, plan: Plan, pool: ResultPool) -> Plan:
    """`plan`, for tensors whose parts do not lie one after another in memory."""
    packs, unpacks = job.packs, job.unpacks
    if packs is None and unpacks is None:
        return plan

    def run(x: torch.Tensor, out: torch.Tensor, timeout: float | None) -> None:
        source, target = x, out
        if packs is not None:
            source = pool.take(x.shape, x.dtype) if x.is_cpu else torch.empty_like(x)
            packs.pack(x, source)
        if unpacks is not None:
            target = pool.take(out.shape, out.dtype) if out.is_cpu else torch.empty_like(out)
        plan(source, target, timeout)
        if unpacks is not None:
            unpacks.unpack(target, out)

    return run
