"""Tables of parts that tests move and reduce by, and one way to call any algorithm."""

import itertools

import torch

from tcomm import reference
from tcomm.cpu.exchange import make_exchange_plan
from tcomm.cpu.reduce_scatter import make_reduce_scatter_plan
from tcomm.kernels import exchange, reduce_scatter
from tcomm.parts import broadcast_parts, exchange_parts, gather_parts, scatter_parts
from tcomm.signature import CallDescription
from tests.test_reference import difference

CPU = ("cpu:pull", "cpu:push")
TRITON = ("triton:pull", "triton:push")
MOVED_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.float8_e4m3fn,
    torch.bfloat16,
    torch.float32,
    torch.int64,
    torch.complex64,
    torch.complex128,
)
GUARD = 3


def uneven(world_size, unit):
    """Sizes of which some are 0, none divides evenly, and the last holds most."""
    return [rank * unit // 2 for rank in range(world_size - 1)] + [2 * unit + 1]


def moves(world_size, unit):
    """Every kind of move: name, sizes of all inputs, parts of a rank, meaning of all inputs."""
    root, even = world_size - 1, [unit] * world_size
    sizes, none = uneven(world_size, unit), [0] * world_size
    one = [unit if rank == root else 0 for rank in range(world_size)]
    counts = [
        [(source + 2 * target) % 3 * unit for target in range(world_size)] for source in range(world_size)
    ]
    for name, lengths in (("even", even), ("uneven", sizes), ("nothing", none), ("one has all", one)):
        yield f"all_gather {name}", lengths, lambda r, s=lengths: gather_parts(s, r), reference.all_gather
    yield "gather", even, lambda r: gather_parts(even, r, root), lambda xs: reference.gather(xs, root)
    yield (
        "broadcast",
        even,
        lambda r: broadcast_parts(unit, world_size, r, root),
        lambda xs: reference.broadcast(xs, root),
    )
    yield (
        "scatter",
        [sum(sizes)] * world_size,
        lambda r: scatter_parts(sizes, r, root),
        lambda xs: reference.scatter(xs, root, 0, sizes),
    )
    yield (
        "all_to_all",
        [sum(row) for row in counts],
        lambda r: exchange_parts(counts, r),
        lambda xs: reference.all_to_all(xs, counts),
    )


def random_inputs(seed, sizes, dtype):
    """One flat tensor per rank, of any bits that are no signalling NaN; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    numbers = [torch.randint(0, 100, (size,), generator=generator) for size in sizes]
    if dtype == torch.bool:
        return [values % 2 == 1 for values in numbers]
    return [values.to(torch.float32).to(dtype) for values in numbers]


def exchange_by(name, x, out, arena, parts, timeout=20.0, piece_nbytes=0):
    """Move by the algorithm of that full name, straight over an arena."""
    engine, _, algorithm = name.partition(":")
    call = CallDescription("exchange", str(x.dtype), algorithm=name)
    if engine == "triton":
        launch = exchange.LAUNCHERS[algorithm]
        launch(x, out, arena, parts, timeout=timeout, call=call, piece_nbytes=piece_nbytes)
    else:
        make_exchange_plan(algorithm, arena, call, parts, x.itemsize, piece_nbytes)(x, out, timeout)


def reduce_scatter_by(name, x, out, arena, parts, op="sum", timeout=20.0, piece_nbytes=0):
    """Reduce by the algorithm of that full name, straight over an arena."""
    engine, _, algorithm = name.partition(":")
    call = CallDescription("reduce_scatter", str(x.dtype), reduce=op, algorithm=name)
    if engine == "triton":
        launch = reduce_scatter.LAUNCHERS[algorithm]
        launch(x, out, arena, parts, op, timeout=timeout, call=call, piece_nbytes=piece_nbytes)
    else:
        plan = make_reduce_scatter_plan(algorithm, arena, call, parts, op, x.dtype, piece_nbytes)
        plan(x, out, timeout)


def guarded(numel, dtype):
    """Memory with a band around, and the odd place in it that belongs to a result."""
    band = torch.full((numel + 2 * GUARD,), 77, dtype=torch.float32).to(dtype)
    return band, band[GUARD : GUARD + numel]


def written_around(band):
    """Whether somebody wrote where nothing belongs."""
    ends = torch.cat([band[:GUARD], band[-GUARD:]])
    return not torch.equal(
        ends.view(torch.uint8), torch.full_like(ends.float(), 77).to(band.dtype).view(torch.uint8)
    )


def mistakes_of_moves(member, arena, seed, name, dtype=torch.float32, unit=5, piece_nbytes=0, wanted=""):
    """Do every move once with random data; what went wrong."""
    found = []
    for what, sizes, parts_of, meaning in moves(member.world_size, unit):
        if wanted not in what:
            continue
        inputs = random_inputs(seed, sizes, dtype)
        expected = meaning(inputs)[member.rank]
        x = inputs[member.rank].clone()
        band, out = guarded(0 if expected is None else expected.numel(), dtype)
        exchange_by(name, x, out, arena, parts_of(member.rank), piece_nbytes=piece_nbytes)
        case = f"{what} by {name}, {dtype}, unit {unit}, seed {seed}"
        if expected is not None and not torch.equal(bits(out), bits(expected)):
            wrong = (bits(out) != bits(expected)).nonzero().view(-1)
            found.append(f"{case}: bytes {wrong[0]} to {wrong[-1]} of {expected.nbytes}, {len(wrong)} wrong")
        if written_around(band):
            found.append(f"{case}: written around the output: {band}")
        if not torch.equal(bits(x), bits(inputs[member.rank])):
            found.append(f"{case}: the input was changed")
    return found


def bits(x):
    """The memory of a contiguous tensor."""
    return x.contiguous().view(-1).view(torch.uint8)


def reductions(world_size, unit):
    """Every kind of reduction in parts: name, sizes of the parts."""
    root = world_size - 1
    yield "even", [unit] * world_size
    yield "uneven", uneven(world_size, unit)
    yield "nothing", [0] * world_size
    yield "reduce", [unit if rank == root else 0 for rank in range(world_size)]


def mistakes_of_reductions(
    member, arena, name, inputs_of, op="sum", unit=5, piece_nbytes=0, in_place=False, wanted=""
):
    """Reduce every kind of parts once; what went wrong. `inputs_of(numel)` gives all ranks' inputs."""
    found = []
    for what, sizes in reductions(member.world_size, unit):
        if wanted not in what:
            continue
        inputs = inputs_of(sum(sizes))
        x, dtype = inputs[member.rank].clone(), inputs[0].dtype
        expected = reference.reduce_scatter(inputs, op, 0, sizes)[member.rank]
        band, out = guarded(expected.numel(), dtype)
        if in_place and expected.numel() == x.numel():
            out = x
        parts = scatter_parts(sizes, member.rank)
        reduce_scatter_by(name, x, out, arena, parts, op, piece_nbytes=piece_nbytes)
        case = f"{what} {op} by {name}, {dtype}, unit {unit}"
        if wrong := difference(out.clone(), expected, op):
            found.append(f"{case}: {wrong}")
        if written_around(band):
            found.append(f"{case}: written around the output: {band}")
        if out is not x and difference(x, inputs[member.rank]):
            found.append(f"{case}: the input was changed")
    return found


def every(names, *others):
    """All combinations, numbered: the number is the seed of their data."""
    return enumerate(itertools.product(names, *others))
