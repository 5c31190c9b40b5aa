"""Memory of virtual ranks on any device, for bodies of tests that are interpreted on a CPU and compiled on a GPU."""

import torch

from tcomm.memory.layout import StagingLayout
from tcomm.memory.virtual import VirtualArena


def device_of(name):
    """The device with its index, as tensors on it have it."""
    return torch.empty(0, device=name).device


def arena_of_half(world, device, nbytes, mode="grid"):
    """An arena whose halves hold so many bytes a rank."""
    return VirtualArena(world, device_of(device), StagingLayout.for_half(nbytes, world), mode)


def settle(arena):
    """Wait until all calls are done, and raise what they found."""
    arena.runtime.synchronise()
    arena.channel.raise_recorded()


def sums_of_products_are_exact(device):
    """Whether numbers have to be chosen so: a GPU multiplies and adds with one rounding, the interpreter with two."""
    return torch.device(device).type != "cpu"


def same_bits(got, want):
    """Whether two tensors are alike in every byte, on whichever devices."""
    got, want = (x.cpu().contiguous().reshape(-1).view(torch.uint8) for x in (got, want))
    return torch.equal(got, want)
