"""Random routings, what must hold of their slots, and kernels against the host, on any device."""

import dataclasses

import numpy as np
import torch

from tcomm.cpu.expert_slots import choose_slots as choose_on_host
from tcomm.cpu.expert_slots import count_slots
from tcomm.eplb.routing import share_thresholds
from tcomm.eplb.tensors import compute_logical_maps
from tcomm.kernels.expert_slots import choose_slots
from tcomm.memory.expert_slots import SlotCounter
from tests.kernels.virtual_arenas import device_of

GUARD = 97
EXAMPLE = {
    "topk": [[0, 1], [0, 2], [0, -1]],
    "map": [[0, 3], [1, -1], [2, -1]],
    "count": [2, 1, 1],
    "load": [0, 0, 0, 7],
    "out": [[0, 1], [3, 2], [0, -1]],
    "counted": [2, 1, 1, 8],
}
"""Of the docstrings."""


@dataclasses.dataclass
class Routing:
    """A map of a layer, tokens, and where they are counted."""

    topk: torch.Tensor
    slots: torch.Tensor
    count: torch.Tensor
    share: torch.Tensor | None
    num_slots: int

    def to(self, device):
        moved = [None if x is None else x.to(device) for x in (self.topk, self.slots, self.count, self.share)]
        return Routing(*moved, self.num_slots)


def random_routing(seed, num_tokens, topk, num_experts, *, dtype=torch.int64, shares=False):
    """Skewed choices, some of them none; up to half as many slots again as experts, and a few without any."""
    made = np.random.default_rng(seed)
    num_slots = num_experts + int(made.integers(0, num_experts // 2 + 2))
    phy2log = np.concatenate([np.arange(num_experts), made.integers(0, num_experts, num_slots - num_experts)])
    phy2log[made.random(num_slots) < 0.03] = -1
    phy2log = torch.from_numpy(made.permutation(phy2log))
    slots, count = compute_logical_maps(phy2log, num_experts)
    if not slots.shape[1]:
        slots = torch.full((num_experts, 1), -1)
    choices = np.minimum(made.zipf(1.3, (num_tokens, topk)) - 1, num_experts - 1)
    choices[made.random((num_tokens, topk)) < 0.05] = -1
    table = share_thresholds(made.random(num_slots) ** 2 + 1e-3, slots, count) if shares else None
    return Routing(torch.from_numpy(choices).to(dtype), slots, count, table, num_slots)


def guarded(shape, dtype, device, value=0):
    """A tensor, and the one around it, whose other elements must stay GUARD."""
    around = torch.full((int(np.prod(shape)) + 2 * 5,), GUARD, dtype=dtype, device=device)
    inner = around[5:-5].view(*shape)
    inner.fill_(value)
    return inner, around


def is_guarded(around):
    return bool((around[:5] == GUARD).all() and (around[-5:] == GUARD).all())


def check_example(device="cpu"):
    device = device_of(device)
    topk, slots, count, load = (
        torch.tensor(EXAMPLE[n], device=device) for n in ("topk", "map", "count", "load")
    )
    out = torch.empty_like(topk)
    choose_slots(topk, slots, count, None, 0, out, SlotCounter(load, 0, None, None))
    assert out.tolist() == EXAMPLE["out"]
    assert load.tolist() == EXAMPLE["counted"]


def check_kernel(
    seed, num_tokens, topk, num_experts, device="cpu", *, dtype=torch.int64, load_dtype=torch.int32, times=2
):
    """Slots and counts of the kernel are those of the host; counters go on counting; nothing else changes."""
    device = device_of(device)
    made = np.random.default_rng(seed)
    given = random_routing(seed, num_tokens, topk, num_experts, dtype=dtype, shares=bool(seed % 2))
    there = given.to(device)
    salt, first = int(made.integers(0, 100)), int(made.integers(0, given.num_slots))
    size = int(made.integers(1, given.num_slots - first + 3))
    out, out_around = guarded((num_tokens, topk), dtype, device)
    load, load_around = guarded((size,), load_dtype, device, 3)
    wanted, wanted_load = torch.empty_like(given.topk), torch.full((size,), 3, dtype=load_dtype)
    choose_on_host(given.topk, given.slots, given.count, given.share, salt, wanted)
    for turn in range(times):
        unpadded = (None, num_tokens // 2, torch.tensor([num_tokens // 3]), num_tokens + 5)[(seed + turn) % 4]
        record = (None, torch.tensor(True), torch.tensor([False]))[(seed + turn) % 3]
        count_slots(wanted, SlotCounter(wanted_load, first, unpadded, record))
        on_device = [x.to(device) if isinstance(x, torch.Tensor) else x for x in (unpadded, record)]
        counter = SlotCounter(load, first, *on_device)
        choose_slots(there.topk, there.slots, there.count, there.share, salt, out, counter)
        assert torch.equal(out.cpu(), wanted)
        assert torch.equal(load.cpu(), wanted_load)
    assert is_guarded(out_around)
    assert is_guarded(load_around)
    out.zero_()
    choose_slots(there.topk, there.slots, there.count, there.share, salt, out, None)
    assert torch.equal(out.cpu(), wanted)


def _check_both(device, topk, slots, count, share, wanted):
    given = [torch.tensor(x, device=device) for x in (topk, slots, count)]
    share = None if share is None else torch.tensor(share, dtype=torch.int32, device=device)
    out = torch.empty_like(given[0])
    load = torch.zeros(3, dtype=torch.int64, device=device)
    choose_slots(*given, share, 0, out, SlotCounter(load, 0, None, None))
    assert out.tolist() == wanted
    assert load.tolist() == [sum(row.count(slot) for row in wanted) for slot in range(3)]
    on_host = torch.empty_like(out, device="cpu")
    choose_on_host(*(x.cpu() for x in given), None if share is None else share.cpu(), 0, on_host)
    assert on_host.tolist() == wanted


def check_out_of_range(device="cpu"):
    """What is no expert gets -1 and is not numbered, also what would be one when cut to 32 bits."""
    device = device_of(device)
    topk = [[3, 1 << 32, -5, 0, (1 << 32) + 1, 0, -1, 1, 2]]
    # An expert without replicas, whatever is in its row.
    slots, wanted = [[0, 2], [1, -1], [2, -1]], [[-1, -1, -1, 0, -1, 2, -1, 1, -1]]
    _check_both(device, topk, slots, [2, 1, 0], None, wanted)
    # No more replicas than there is room for.
    _check_both(device, [[0, 0, 0, 1]], [[0, 2], [1, -1]], [3, 1], None, [[0, 2, 0, 1]])


def check_thresholds(device="cpu"):
    """A value that is a threshold goes on to the next replica, and none goes beyond the last."""
    device = device_of(device)
    _check_both(device, [[0, 0, 0]], [[0, 1, 2]], [3], [[0, 40503, 65536]], [[1, 2, 1]])
    _check_both(device, [[0, 1, 0]], [[0, 1, 2], [0, 1, 2]], [3, 2], [[0, 0, 0]] * 2, [[2, 1, 2]])
