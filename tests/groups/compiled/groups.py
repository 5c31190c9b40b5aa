"""A group as ops see it, for tests: a device communicator under a registered name."""

import torch.distributed as dist

from tcomm.groups.compiled.registry import register, unique_name
from tcomm.groups.device import CpuCommunicator


class Group:
    """What a group coordinator is to ops."""

    def __init__(self, group=None, base="tp", timeout=20.0):
        self.unique_name = unique_name(base)
        self.destroyed = False
        self.device_group = group
        self.device_communicator = CpuCommunicator(group, unique_name=self.unique_name, timeout=timeout)
        self.world_size = self.device_communicator.world_size
        register(self)

    def _all_reduce_out_place(self, x):
        return self.device_communicator.all_reduce(x)

    def _all_gather_out_place(self, x, dim):
        return self.device_communicator.all_gather(x, dim)

    def _reduce_scatter_out_place(self, x, dim):
        return self.device_communicator.reduce_scatter(x, dim)

    def destroy(self):
        self.destroyed = True
        self.device_communicator.destroy()


class Alone:
    """A coordinator of one rank: it gives back what it is given, and has no communicator."""

    world_size, destroyed, device_communicator = 1, False, None

    def __init__(self):
        self.unique_name = unique_name("alone")
        register(self)

    def _all_reduce_out_place(self, x):
        return x

    def _all_gather_out_place(self, x, dim):
        return x

    def _reduce_scatter_out_place(self, x, dim):
        return x


def make_group(member, timeout=20.0):
    """A registered group of all ranks of a test's world."""
    if not dist.is_initialized():
        member.process_group()
    return Group(dist.group.WORLD, timeout=timeout)
