"""What ranks of `tcomm.cli.workers` are asked to do in tests."""

import os
import time

import torch
import torch.distributed as dist

from tcomm.cli.cases import VERBS, Case
from tcomm.cli.contenders import BASELINES, Tcomm
from tcomm.errors import CapabilityError
from tcomm.groups.communicator import Communicator
from tcomm.tuning.measure import Schedule, time_alternating


def wrong_elements(names: list[str], kinds: list[tuple[str, str]], numels: list[int]):
    """For each (op, redop), over a few calls of each contender, on all ranks: `_wrong_elements_of` it."""
    with Communicator(timeout=30.0) as comm:
        return [_wrong_elements_of(comm, names, op, numels, redop) for op, redop in kinds]


def _wrong_elements_of(comm, names, op, numels, redop):
    """For each number of elements, {out: {name: count}}."""
    return [
        {out: _count(comm, names, op, numel, redop, out == "reused") for out in ("reused", "allocated")}
        for numel in numels
    ]


def _count(comm, names, op, numel, redop, reuses):
    case = Case(op, comm.rank, comm.world_size, numel, torch.float32, redop, reuses)
    calls = {name: BASELINES[name](case) for name in names}
    if all(hasattr(comm, verb) for verb in (VERBS[op], "send")):
        calls["tcomm"] = Tcomm(case, comm, "")
    candidates = {name: case.candidate(call.call_of(op)) for name, call in calls.items()}
    _, wrong = time_alternating(candidates, Schedule(1, 9, 0), comm.barrier)
    counts = torch.tensor(list(wrong.values()))
    dist.all_reduce(counts)
    return dict(zip(wrong, counts.tolist(), strict=True))


def add(a: int, b: int):
    total = torch.tensor([a * dist.get_rank() + b])
    dist.all_reduce(total)
    return {"total": int(total), "pid": os.getpid(), "cores": sorted(os.sched_getaffinity(0))}


def fail_on_rank_1():
    if dist.get_rank() == 1:
        raise ValueError("rank 1 does not like it")
    dist.barrier()


def exit_on_the_last_rank():
    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(7)
    dist.barrier()


def refuse():
    raise CapabilityError("not that")


def sleep():
    time.sleep(60)
