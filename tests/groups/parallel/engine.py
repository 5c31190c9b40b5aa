"""Groups for tests: made on ranks, taken down again."""

import contextlib

import torch
import torch.distributed as dist

from tcomm.groups.parallel import environment, parallel_state
from tcomm.groups.parallel.coordinator import GroupCoordinator


@contextlib.contextmanager
def coordinator(member, with_device=True, with_queue=False, name="tp", rows=None, **options):
    """A coordinator of all ranks, or of one of several rows."""
    member.process_group()
    rows = rows or [list(range(member.world_size))]
    group = GroupCoordinator(rows, member.rank, "gloo", with_device, with_queue, name, timeout=20, **options)
    try:
        yield group
    finally:
        group.destroy()
        dist.destroy_process_group()


@contextlib.contextmanager
def engine(member, tp=1, pp=1, pcp=1, dcp=1):
    """The current state, with its groups."""
    member.process_group()
    environment.init_distributed_environment(backend="gloo", local_rank=member.rank)
    parallel_state.initialize_model_parallel(tp, pp, pcp, dcp)
    try:
        yield parallel_state
    finally:
        environment.cleanup_dist_env_and_memory()


def refusal(call, *args, **kwargs):
    """Kind and text of what a call raises, without its group's number."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def numbers(*shape, offset=0.0):
    """A tensor of its own indices."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float32) + offset).reshape(shape)
