"""Every verb called alike, and what the reference says that it gives: for the tests of the group layer."""

import itertools

import torch

import tcomm
from tcomm import reference
from tests.test_reference import difference, every_ranks_input

PULL_AND_PUSH = ("cpu:pull", "cpu:push", "triton:pull", "triton:push")
MOVED = (
    torch.bool,
    torch.uint8,
    torch.float8_e4m3fn,
    torch.bfloat16,
    torch.int64,
    torch.float64,
    torch.complex64,
    torch.complex128,
)
"""One dtype of each kind and size that data may have where it only moves."""

MOVING_WORLDS = (
    *((2, name) for name in (*PULL_AND_PUSH, "torch")),
    (3, "cpu:push"),
    (3, "torch"),
    (4, "cpu:pull"),
)
"""Sizes of worlds in which data moves, and by what: each algorithm of the host in two of them."""

EXPECTED = {
    "all_reduce": reference.all_reduce,
    "reduce": reference.reduce,
    "reduce_scatter_single": lambda xs, op="sum", dim=0: reference.reduce_scatter(xs, op, dim),
    "reduce_scatterv": lambda xs, sizes, op="sum", dim=0: reference.reduce_scatter(xs, op, dim, sizes),
    "all_gather_single": reference.all_gather,
    "all_gatherv": lambda xs, sizes=None, dim=0: reference.all_gather(xs, dim),
    "gather": reference.gather,
    "broadcast": reference.broadcast,
    "scatter": reference.scatter,
    "all_to_all_single": reference.all_to_all,
}
"""What a verb gives to every rank: takes all inputs and the verb's own arguments."""


def group_for(member, algorithm, **kwargs):
    """A communicator that has `algorithm`; over a process group where that is torch's."""
    if algorithm.startswith("torch"):
        member.process_group()
        return tcomm.Communicator(name="test", timeout=20.0, **kwargs)
    return member.communicator(**kwargs)


def kinds_to_move(algorithm):
    """Dtypes and shapes of rows: rows of some elements of each dtype, of one and of none of a few."""
    kinds = [(dtype, (3,)) for dtype in MOVED]
    few = itertools.product(MOVED[::3], [(), (0, 4)])
    return kinds if algorithm.startswith("triton") else [*kinds, *few]


def random_bytes(seed, shape, dtype):
    """A tensor of arbitrary bits, which are those of a bool where it is one."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (nbytes,), generator=generator, dtype=torch.uint8).view(dtype).view(shape)


def inputs_to_move(seed, shapes, dtype):
    """One tensor of each shape, arbitrary in every bit; the same in every process."""
    return [random_bytes(100 * seed + index, shape, dtype) for index, shape in enumerate(shapes)]


def inputs_to_reduce(seed, world_size, shape, dtype):
    """One tensor for each rank, with all the special values of its dtype among them."""
    return every_ranks_input(seed, world_size, shape, dtype, special=True)


def unequal_bits(got, want):
    """What is wrong with moved data; empty when every bit is as wanted."""
    if got is None or want is None:
        return "" if got is want else f"{got} instead of {want}"
    if (got.shape, got.dtype) != (want.shape, want.dtype):
        return f"{got.dtype} {list(got.shape)} instead of {want.dtype} {list(want.shape)}"
    same = _bytes(got) == _bytes(want)
    return "" if same.all() else f"{(~same).sum()} of {same.numel()} bytes differ"


def _bytes(x):
    dense = x.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return dense.view(-1).view(torch.uint8)


def wrong_result(got, want, op=""):
    """What is wrong with a result, reduced by `op` or only moved; empty when nothing is."""
    return (
        difference(got, want, op) if op and got is not None and want is not None else unequal_bits(got, want)
    )


def mistake(comm, verb, inputs, *args, op="", expected=None, **options):
    """Call `verb` on this rank's input. Empty when it gives what the reference says, else the case and why.

    `op` has to be said for verbs that reduce, besides its place among `args`.
    """
    x = inputs[comm.rank]
    before = x.clone()
    if expected is None:
        dim = {"dim": options["dim"]} if "dim" in options else {}
        expected = EXPECTED[verb](inputs, *args, **dim)
    got = getattr(comm, verb)(x, *args, **options)
    wrong = wrong_result(got, expected[comm.rank], op) or unequal_bits(x, before)
    case = f"{verb}{args} {options} of {x.dtype} {list(x.shape)} on rank {comm.rank}"
    return f"{case}: {wrong}" if wrong else ""


def sizes_for(world_size):
    """Lengths of every rank that differ, with none, in the middle and at the end, and everything on one."""
    return [
        [3 * rank + 1 for rank in range(world_size)],
        [0 if rank == world_size // 2 else 5 for rank in range(world_size)],
        [0] * world_size,
        *([7 if rank == holder else 0 for rank in range(world_size)] for holder in (0, world_size - 1)),
    ]


def odd_views(x):
    """The values of x in memory that is laid out otherwise; x has two dimensions at least."""
    gaps = torch.zeros(*x.shape, 2, dtype=x.dtype)
    gaps[..., 1] = x
    if x.numel() == 1:
        return {"one element of a stride": gaps.view(-1)[1:].as_strided(x.shape, (2,) * x.dim())}
    views = {
        "transposed": x.transpose(0, -1).contiguous().transpose(0, -1),
        "gaps": gaps[..., 1],
        "offset": torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[1:].view(x.shape),
    }
    if x.is_complex():
        views["conjugated"] = x.conj().resolve_conj().conj()
    if x.is_floating_point() and x.dtype.itemsize >= 4:
        views["negated"] = torch._neg_view(-x)
    return views


def odd_outs(shape, dtype):
    """Memory for a result, laid out otherwise: (name, out, the memory around it)."""
    plain = torch.zeros(shape, dtype=dtype)
    yield "plain", plain, plain
    transposed = torch.zeros(tuple(reversed(shape)), dtype=dtype).permute(*reversed(range(len(shape))))
    yield "transposed", transposed, transposed
    gaps = torch.zeros(*shape, 2, dtype=dtype)
    yield "gaps", gaps[..., 1], gaps
    if dtype.is_complex:
        conjugated = torch.zeros(shape, dtype=dtype).conj()
        yield "conjugated", conjugated, conjugated


def dims_of(shape):
    """Every dimension, from the front and from the back."""
    return range(-len(shape), len(shape))


def join(*lists):
    """What is wrong, of all; empty lines left out."""
    return [line for line in itertools.chain(*lists) if line]
