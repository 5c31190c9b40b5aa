"""Facts about algorithms; and one way to call any of them, which the tests of both engines use."""

import pytest
import torch
import torch.distributed as dist

from tcomm import reference
from tcomm.algorithms import ALGORITHMS, REDUCE_OPS, acc_dtype, reduce_op_name
from tcomm.cpu.all_reduce import make_plan
from tcomm.errors import ConfigError
from tcomm.kernels.all_reduce import LAUNCHERS
from tcomm.signature import CallDescription
from tests.test_reference import DTYPES, difference, every_ranks_input

CPU = tuple(a.name for a in ALGORITHMS["all_reduce"] if a.engine == "cpu")
TRITON = tuple(a.name for a in ALGORITHMS["all_reduce"] if a.engine == "triton")


def description(name, x, op):
    dtype = str(x.dtype).removeprefix("torch.")
    return CallDescription("all_reduce", dtype, tuple(x.shape), op, algorithm=name)


def reduce_by(name, x, arena, op="sum", out=None, timeout=20.0, piece_nbytes=0):
    """All-reduce by the algorithm of that full name, straight over an arena."""
    engine, _, algorithm = name.partition(":")
    if engine == "triton":
        return LAUNCHERS[algorithm](x, arena, op, out=out, timeout=timeout)
    out = torch.empty_like(x) if out is None else out
    plan = make_plan(algorithm, arena, description(name, x, op), op, x.dtype, x.shape, piece_nbytes)
    plan(x, out, timeout)
    return out


def mistake(member, arena, seed, name, op="sum", dtype=torch.float32, shape=(7,), **kwargs):
    """Call once with random data; empty when the result has the reference's bits, else the case and why."""
    inputs = every_ranks_input(seed, member.world_size, shape, dtype, special=kwargs.pop("special", False))
    x = inputs[member.rank].clone()
    out = x if kwargs.pop("in_place", False) else None
    got = reduce_by(name, x, arena, op, out, **kwargs)
    wrong = difference(got, reference.all_reduce(inputs, op)[0], op)
    if out is None and not wrong and difference(x, inputs[member.rank]):
        wrong = "the input was changed"
    return f"{name} {op} {dtype} {list(shape)} seed {seed}: {wrong}" if wrong else ""


def supported(name):
    """Every (op, dtype) that the algorithm says it can do."""
    algorithm = next(a for a in ALGORITHMS["all_reduce"] if a.name == name)
    return [(op, dtype) for op in REDUCE_OPS for dtype in DTYPES if not algorithm.refusal(op, dtype)]


def test_every_algorithm_has_an_implementation_and_no_other_is_listed():
    assert set(LAUNCHERS) == {name.partition(":")[2] for name in TRITON}
    assert CPU == ("cpu:one_shot_push", "cpu:one_shot_pull", "cpu:two_shot")


@pytest.mark.parametrize(
    ("dtype", "acc"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.int32, torch.int32),
        (torch.int64, torch.int64),
    ],
)
def test_only_halves_are_accumulated_in_a_wider_type(dtype, acc):
    assert acc_dtype(dtype) == acc


def test_refusals_say_why():
    by_name = {a.name: a for a in ALGORITHMS["all_reduce"]}
    pull, lanes = by_name["cpu:one_shot_pull"], by_name["triton:one_shot_ll"]
    assert pull.refusal("sum", torch.float64) == ""
    assert pull.refusal("product", torch.float32) == "product is not among sum, avg, max, min"
    assert pull.refusal("avg", torch.int32) == "the average of torch.int32 is not a torch.int32"
    assert lanes.refusal("sum", torch.float64) == (
        "torch.float64 is not among float32, float16, bfloat16, int32"
    )
    assert all(a.refusal("sum", torch.uint8) for a in ALGORITHMS["all_reduce"])


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("sum", "sum"),
        ("SUM", "sum"),
        (dist.ReduceOp.SUM, "sum"),
        (dist.ReduceOp.AVG, "avg"),
        (dist.ReduceOp.MAX, "max"),
        (dist.ReduceOp.MIN, "min"),
        (dist.ReduceOp.PRODUCT, "product"),
        (dist.ReduceOp.BXOR, "bxor"),
    ],
)
def test_operations_go_by_name_or_by_torchs_enum(given, name):
    assert reduce_op_name(given) == name


@pytest.mark.parametrize("given", ["mean", "", None, 3, ["sum"], dist.ReduceOp.PREMUL_SUM])
def test_an_unknown_operation_is_refused_by_name(given):
    with pytest.raises(ConfigError) as caught:
        reduce_op_name(given)
    assert str(caught.value) == (
        f"reduce operation {given!r} is unknown; give one of sum, avg, max, min, product, band, bor, bxor "
        "or a torch.distributed.ReduceOp"
    )
