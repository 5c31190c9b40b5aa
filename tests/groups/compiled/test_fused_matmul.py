"""The product of scaled fp8 matrices, reduced and scattered: against one process, and its fake."""

import pytest
import torch
import torch.distributed as dist

from tcomm.errors import ConfigError
from tcomm.groups.compiled import fused_matmul
from tests.groups.compiled.groups import Group, make_group
from tests.groups.verbs import join

FP8 = torch.float8_e4m3fn
FUSED = fused_matmul.patched_fused_scaled_matmul_reduce_scatter
FAKE = fused_matmul.patched_fused_scaled_matmul_reduce_scatter_fake
OP = torch.ops.tcomm.patched_fused_scaled_matmul_reduce_scatter


def _case(rank, leading, rowwise):
    generator = torch.Generator().manual_seed(rank)
    a = torch.randn(*leading, 32, generator=generator).to(FP8)
    b = torch.randn(16, 32, generator=generator).to(FP8).t()
    if not rowwise:
        return a, b, torch.tensor(0.5), torch.tensor([0.25])
    scales = torch.rand(*leading, 1, generator=generator), torch.rand(1, 16, generator=generator)
    return a, b, *scales


def _product(a, b, a_scale, b_scale, bias):
    """In double precision."""
    return (a.double() * a_scale.double()) @ (b.double() * b_scale.double()) + bias.double()


def _against_one_process(member):
    group, rank, found = make_group(member), member.rank, []
    bias = torch.arange(16, dtype=torch.bfloat16)
    by_torchs_name = dist.group.WORLD.group_name
    for leading, dim, rowwise, op, name in (
        ((4,), 0, False, "sum", group.unique_name),
        ((2, 6), 1, True, "avg", group.unique_name),
        ((2, 6), 0, True, "sum", by_torchs_name),
        ((6,), -1, False, "sum", by_torchs_name),
    ):
        cases = [_case(r, leading, rowwise) for r in range(2)]
        want = sum(_product(*case, bias) for case in cases) / (1 if op == "sum" else 2)
        want = want.chunk(2, dim)[rank]
        args = (*cases[rank], op, dim, 0, name, [*leading, 16], bias, None)
        for call in (FUSED, OP):
            got = call(*args, torch.float32)
            if not torch.allclose(got.double(), want, rtol=1e-5, atol=1e-5):
                found.append(f"{leading} {dim} {op}: {(got - want).abs().max()}")
            fake = FAKE(*args, torch.float32)
            found.append("" if (fake.shape, fake.dtype) == (got.shape, got.dtype) else f"{fake.shape}")
        rounded = FUSED(*args, torch.bfloat16)
        found.append("" if torch.allclose(rounded.double(), want, rtol=0.02, atol=0.2) else "bfloat16")
    a, b, a_scale, b_scale = _case(rank, (4,), False)

    def graph(a, name):
        return OP(a, b, a_scale, b_scale, "sum", 0, 0, name, [4, 16], None, None, torch.bfloat16) * 2

    compiled = torch.compile(graph, fullgraph=True, backend="aot_eager")
    same = torch.equal(compiled(a, group.unique_name), graph(a, group.unique_name))
    found.append("" if same else "the compiled graph differs")
    torch.compiler.reset()
    group.destroy()
    return join(found)


def test_it_is_the_product_of_one_process(on_ranks):
    assert on_ranks(2, _against_one_process) == [[]] * 2


@pytest.fixture
def alone():
    group = Group(base="fused")
    yield group.unique_name
    group.destroy()


@pytest.mark.parametrize("call", [FUSED, FAKE])
def test_mistakes(call, alone):
    a, b, _, b_scale = _case(0, (2, 6), True)
    one, rest = torch.ones(1), ("sum", 0, 0, alone, [2, 6, 16])
    for a_scale, told in (
        (
            torch.ones(12, 1),
            "For row-wise scaling, the leading dims of A_scale must match the leading dims of A",
        ),
        (torch.ones(0), "Invalid A_scale shape"),
        (torch.ones(2, 6, 2), "Invalid A_scale shape"),
    ):
        with pytest.raises(ValueError, match=told):
            call(a, b, a_scale, b_scale, *rest)
    with pytest.raises(ConfigError, match="times B"):
        call(a, b.t(), one, one, *rest)
    with pytest.raises(ConfigError, match=r"B_scale \[3\]: needed one element or \[1, 16\]"):
        call(a, b, one, torch.ones(3), *rest)
    with pytest.raises(ConfigError, match="does not hold the rows of A"):
        call(a, b, one, one, "sum", 0, 0, alone, [3, 6, 16])
    with pytest.raises(ConfigError, match="dim=3 of"):
        call(a, b, one, one, "sum", 3, 0, alone, [2, 6, 16])
    with pytest.raises(AssertionError, match="Group nobody is not found"):
        call(a, b, one, one, "sum", 0, 0, "nobody", [2, 6, 16])
    with pytest.raises(ConfigError, match="would lose the gradient"):
        call(a, b, one.clone().requires_grad_(), one, *rest)


def test_what_becomes_fp8(alone):
    a, b = torch.full((2, 16), 2.0).to(FP8), torch.full((16, 16), 4.0).to(FP8)
    rest = ("sum", 0, 0, alone, [2, 16], None, torch.tensor(0.5))
    scaled = FUSED(a, b, torch.tensor(0.5), torch.tensor(0.5), *rest)
    assert scaled.dtype is FP8
    assert scaled.float().eq(16).all()
    assert FAKE(a, b, torch.tensor(1.0), torch.tensor(1.0), *rest).dtype is FP8
    # The scale of the result is for fp8 only, and what is too large for it is the largest there is.
    wide = FUSED(a, b, torch.tensor(0.5), torch.tensor(0.5), *rest, torch.float32)
    assert wide.eq(32).all()
    assert FUSED(a, b, torch.tensor(100.0), torch.tensor(1.0), *rest).float().eq(448).all()
