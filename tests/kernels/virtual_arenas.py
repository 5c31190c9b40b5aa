"""Memory of virtual ranks, for bodies of tests that are interpreted on a CPU and compiled on a GPU."""

import torch

from tcomm.errors import PeerTimeoutError
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


def leave_out(arena, missing):
    """Take the launches of a rank away: it never comes. Of ranks in streams."""
    arena.launch_parts = tuple(part for part in arena.launch_parts if part.rank != missing)


def failure_of(arena, run):
    """What a call raises: at once when interpreted, and when it is asked for when compiled."""
    try:
        run()
        settle(arena)
    except PeerTimeoutError as error:
        return error
    raise AssertionError("nothing was raised")


def check_rounds(rounds, run=None, times=6):
    """New tokens in the same memory come out right, however they are run."""
    run = run or rounds.run
    wrong = torch.zeros((), dtype=torch.int64, device=rounds.arena.device)
    for index in range(times):
        rounds.put(index % 3)
        # Whatever is made on the way has to say on which device.
        with torch.device("meta"):
            run()
        wrong += rounds.count_wrong(index % 3)
    settle(rounds.arena)
    assert int(wrong) == 0


def sums_of_products_are_exact(device):
    """Whether numbers are chosen so: a GPU multiplies and adds with one rounding, the interpreter with 2."""
    return torch.device(device).type != "cpu"


def same_bits(got, want):
    """Whether two tensors are alike in every byte, on whichever devices."""
    # A dimension of one is contiguous for torch at any stride, and yet no view of it can be taken.
    got, want = (x.cpu().clone(memory_format=torch.contiguous_format) for x in (got, want))
    return torch.equal(got.reshape(-1).view(torch.uint8), want.reshape(-1).view(torch.uint8))
