"""Bodies of tests of virtual ranks, for any device: interpreted on a CPU, compiled on a GPU."""

import itertools
import random

import pytest
import torch

from tcomm import VirtualRanks, reference
from tcomm.errors import PeerTimeoutError
from tcomm.kernels import all_reduce, exchange, reduce_scatter
from tcomm.memory.control import EPOCH_MASK, Word
from tests.moves import MOVED_DTYPES, random_inputs
from tests.test_algorithms import supported
from tests.test_reference import every_ranks_input

MODES = ("grid", "streams")
ALGORITHMS = {
    "all_reduce": tuple(all_reduce.LAUNCHERS),
    "reduce_scatter_single": tuple(reduce_scatter.LAUNCHERS),
    "all_gather_single": tuple(exchange.LAUNCHERS),
    "all_to_all_single": tuple(exchange.LAUNCHERS),
    "broadcast": tuple(exchange.LAUNCHERS),
}
CASES = [(verb, algorithm) for verb, algorithms in ALGORITHMS.items() for algorithm in algorithms]
REDUCING = ("all_reduce", "reduce_scatter_single")
DIVIDED = ("reduce_scatter_single", "all_to_all_single")
"""Verbs whose row must have a multiple of W elements."""
STAGING = 1 << 20
FRAME_BYTES = 64


def make(device, world, mode="grid", staging_bytes=STAGING, timeout=60.0):
    return VirtualRanks(world, device, staging_bytes=staging_bytes, mode=mode, timeout=timeout)


def call(ranks, verb, algorithm, x, op="sum", root=0, **kwargs):
    """One call, whatever else its verb wants."""
    kwargs["algorithm"] = algorithm
    if verb in REDUCING:
        kwargs["op"] = op
    if verb == "broadcast":
        kwargs["root"] = root
    return getattr(ranks, verb)(x, **kwargs)


def meaning(verb, inputs, op="sum", root=0):
    """Every rank's result, [W, ...]."""
    if verb == "broadcast":
        results = reference.broadcast(inputs, root)
    elif verb in REDUCING:
        results = getattr(reference, verb.removesuffix("_single"))(inputs, op)
    else:
        results = getattr(reference, verb.removesuffix("_single"))(inputs)
    return torch.stack(results)


def length_of(verb, numel, world):
    """`numel`, or the next length that the verb can cut."""
    return -(-numel // world) * world if verb in DIVIDED else numel


def make_inputs(verb, seed, world, numel, dtype, special=False):
    if verb in REDUCING:
        return every_ranks_input(seed, world, (numel,), dtype, special)
    return random_inputs(seed, [numel] * world, dtype)


def put(ranks, inputs):
    """All ranks' inputs as one tensor on their device."""
    x = ranks.empty(*inputs[0].shape, dtype=inputs[0].dtype)
    x.copy_(torch.stack(inputs))
    return x


def as_bytes(x):
    return x.contiguous().reshape(-1).view(torch.uint8)


def count_different(got, want, op="sum"):
    """How many elements have other bits, as a tensor on their device; any NaN and, for max, zero will do."""
    size = got.dtype.itemsize
    got, want = got.contiguous(), want.contiguous()
    if got.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=got.device)
    differs = (as_bytes(got).view(-1, size) != as_bytes(want).view(-1, size)).any(1)
    if got.dtype.is_floating_point and size > 1:
        flat_got, flat_want = got.reshape(-1), want.reshape(-1)
        differs &= ~((flat_got != flat_got) & (flat_want != flat_want))
        if op in {"max", "min"}:
            differs &= ~((flat_got == 0) & (flat_want == 0))
    return differs.sum()


def mistake(ranks, seed, verb, algorithm, dtype, numel, op="sum", special=False, in_place=False):
    """Call on new tensors, compiled kernels twice (then as bound); empty when all has the right bits."""
    world = ranks.world_size
    numel, root = length_of(verb, numel, world), seed % world
    for again in (0,) if ranks.device.type == "cpu" else (0, 1000):
        inputs = make_inputs(verb, seed + again, world, numel, dtype, special)
        x = put(ranks, inputs)
        got = call(ranks, verb, algorithm, x, op, root, out=x if in_place else None)
        ranks.check()
        want = meaning(verb, inputs, op, root)
        name = f"{verb} {algorithm} {op} {dtype} [{numel}] of {world} seed {seed + again}"
        if got.shape != want.shape:
            return f"{name}: {list(got.shape)} instead of {list(want.shape)}"
        if wrong := int(count_different(got.cpu(), want, op)):
            return f"{name}: {wrong} of {want.numel()} differ"
        if not in_place and int(count_different(x.cpu(), torch.stack(inputs))):
            return f"{name}: the input was changed"
    return ""


def check_meaning(device, world, mode, numels, dtypes=(torch.bfloat16,), cases=CASES):
    """Every algorithm at these sizes."""
    ranks = make(device, world, mode)
    found = [
        mistake(ranks, seed, verb, algorithm, dtype, numel)
        for seed, ((verb, algorithm), numel, dtype) in enumerate(itertools.product(cases, numels, dtypes))
    ]
    assert not any(found), "\n".join(filter(None, found))


def check_reductions(device, world, mode, numel=77, wanted=None):
    """Every operation and dtype that an algorithm can do, or those wanted, with infinities, NaN and ties."""
    ranks = make(device, world, mode)
    found = []
    for verb in REDUCING:
        for algorithm in ALGORITHMS[verb]:
            name = f"triton:{algorithm if verb == 'all_reduce' else 'two_shot'}"
            for seed, (op, dtype) in enumerate(supported(name)):
                if wanted is None or (op, dtype) in wanted:
                    found.append(mistake(ranks, seed, verb, algorithm, dtype, numel, op, special=True))
    assert len(found) > (50 if wanted is None else len(wanted))
    assert not any(found), "\n".join(filter(None, found))


def check_moves(device, world, mode, numel=37):
    """What only moves, in any dtype."""
    ranks = make(device, world, mode)
    moving = [case for case in CASES if case[0] not in REDUCING]
    found = [
        mistake(ranks, seed, verb, algorithm, dtype, numel)
        for seed, ((verb, algorithm), dtype) in enumerate(itertools.product(moving, MOVED_DTYPES))
    ]
    assert not any(found), "\n".join(filter(None, found))


def check_pieces(device, world, mode):
    """Messages longer than staging holds go in pieces, each a call of its own."""
    ranks = make(device, world, mode, staging_bytes=64 * 1024)
    numel = 12 * 1024 + 6
    found = [
        mistake(ranks, seed, verb, algorithm, torch.bfloat16, numel)
        for seed, (verb, algorithm) in enumerate(CASES)
    ]
    assert not any(found), "\n".join(filter(None, found))


def check_in_place(device, world, mode):
    ranks = make(device, world, mode)
    found = [
        mistake(ranks, numel, "all_reduce", algorithm, torch.float32, numel, in_place=True)
        for algorithm, numel in itertools.product(ALGORITHMS["all_reduce"], (5, 1003))
    ]
    assert not any(found), "\n".join(filter(None, found))


def framed(ranks, rows):
    """Rows within memory of which every other byte is 0x5A: (all of it as bytes, the rows)."""
    size, row = rows.dtype.itemsize, rows.shape[1] * rows.dtype.itemsize
    padded = -(-row // 16) * 16 + 2 * FRAME_BYTES
    whole = torch.full((len(rows), padded), 0x5A, dtype=torch.uint8, device=ranks.device)
    first = FRAME_BYTES // size
    view = whole.view(rows.dtype)[:, first : first + rows.shape[1]]
    view.copy_(rows)
    return whole, view


def check_guard_bands(device, world, mode, numels=(1, 13, 1001), dtype=torch.bfloat16):
    """Nothing is written but out: not a byte around it, and not a byte of x or around it."""
    ranks = make(device, world, mode)
    for seed, ((verb, algorithm), numel) in enumerate(itertools.product(CASES, numels)):
        inputs = make_inputs(verb, seed, world, length_of(verb, numel, world), dtype)
        want = meaning(verb, inputs)
        x_whole, x = framed(ranks, torch.stack(inputs))
        x_before = x_whole.clone()
        out_whole, out = framed(ranks, torch.zeros_like(want))
        expected = framed(ranks, want)[0]
        call(ranks, verb, algorithm, x, out=out)
        ranks.check()
        name = f"{verb} {algorithm} [{numel}]"
        assert torch.equal(out_whole, expected), f"{name}: wrong, or written outside of out"
        assert torch.equal(x_whole, x_before), f"{name}: x or what is around it was written"


def make_jobs(ranks, numels, dtypes, seeds=(0,)):
    """Calls with their inputs and expected results on the device, to be made in any order."""
    jobs = []
    for (verb, algorithm), numel, dtype, seed in itertools.product(CASES, numels, dtypes, seeds):
        world = ranks.world_size
        inputs = make_inputs(verb, seed, world, length_of(verb, numel, world), dtype)
        want = meaning(verb, inputs).to(ranks.device)
        jobs.append((verb, algorithm, put(ranks, inputs), want))
    return jobs


def run_jobs(ranks, jobs, calls, order):
    """Calls back to back, in random order, nothing awaited in between; how many elements were wrong."""
    wrong = torch.zeros((), dtype=torch.int64, device=ranks.device)
    for _ in range(calls):
        verb, algorithm, x, want = order.choice(jobs)
        wrong += count_different(call(ranks, verb, algorithm, x), want)
    ranks.check()
    return int(wrong)


def check_reuse(device, world, mode, calls, numels=(1, 100, 3001), seed=0):
    """Calls back to back, of alternating sizes and algorithms, each result looked at."""
    ranks = make(device, world, mode)
    jobs = make_jobs(ranks, numels, (torch.bfloat16, torch.float32), (seed, seed + 1))
    assert run_jobs(ranks, jobs, calls, random.Random(seed)) == 0


def epochs(ranks):
    return [int(epoch) & EPOCH_MASK for epoch in ranks.arena.pages[:, Word.EPOCH].cpu()]


def check_epochs_near(device, world, mode, start, calls=8):
    """Calls across a wrap or a renewal, by lanes and by flags: exact results, and epochs that went on."""
    ranks = make(device, world, mode)
    jobs = make_jobs(ranks, (100,), (torch.float32,))
    # What earlier calls left in both parities must not be taken for arrivals later.
    assert run_jobs(ranks, jobs, 4, random.Random(1)) == 0
    ranks.arena.set_epoch(start)
    for index in range(calls):
        # Every second call by lanes, which have no other flag than the epoch in them.
        job = jobs[0] if index % 2 else jobs[(index // 2) % len(jobs)]
        assert run_jobs(ranks, [job], 1, random.Random(0)) == 0, (index, job[:2])
        assert epochs(ranks) == [(start + index + 1) & EPOCH_MASK] * world


def without(ranks, missing):
    """Take a rank's launches away: it never comes."""
    ranks.arena.launch_parts = tuple(part for part in ranks.arena.launch_parts if part.rank != missing)


def failure_of(ranks, run):
    """What a call raises: at once when interpreted, and when it is asked for when compiled."""
    try:
        run()
        ranks.check()
    except PeerTimeoutError as error:
        return error
    raise AssertionError("nothing was raised")


def check_missing_rank(device, world, verb, algorithm, missing, timeout=1.0):
    """The others end within the deadline, name the rank, and new ranks work."""
    ranks = make(device, world, "streams")
    without(ranks, missing)
    x = put(ranks, make_inputs(verb, 0, world, length_of(verb, 100, world), torch.float32))
    error = failure_of(ranks, lambda: call(ranks, verb, algorithm, x, timeout=timeout))
    assert tuple(error.peers) == (missing,)
    first = min(set(range(world)) - {missing})
    assert str(error).startswith(
        f"{verb.removesuffix('_single')}: virtual rank {first} waited for rank {missing}, which did not come "
        f"in time ({timeout:g} s); make new virtual ranks"
    )
    for attempt in (lambda: call(ranks, verb, algorithm, x), ranks.check, ranks.barrier):
        with pytest.raises(PeerTimeoutError):
            attempt()
    assert mistake(make(device, world), 0, verb, algorithm, torch.float32, 100) == ""
