"""The ops: what they give, in graphs too; their own memory; no gradient lost."""

import shutil

import pytest
import torch
from torch.autograd import forward_ad

from tcomm.errors import ConfigError
from tcomm.groups.compiled import ops
from tests.groups.compiled.groups import Alone, Group, make_group

OPS = torch.ops.tcomm


def _layer(x, name):
    """Two layers of a model split by columns and rows, and some memory traffic between."""
    total = OPS.all_reduce(x.t() * 2, name)
    gathered = OPS.all_gather(total.relu(), -1, 2, name)
    return OPS.reduce_scatter(gathered + 1, 0, 2, name) * 3


def _raised(call, *args):
    try:
        call(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def _layer_of_products(x, name):
    """The same traffic between what Inductor calls instead of writing C++ for it."""
    gathered = OPS.all_gather(OPS.all_reduce(torch.mm(x.t(), x), name), -1, 2, name)
    return torch.mm(OPS.reduce_scatter(gathered, 0, 2, name), gathered.t())


def _of_layers(inputs, rank):
    """What both layers give."""
    total = sum(inputs).t() * 2
    of_layer = (torch.cat([total.relu()] * 2, -1) + 1).mul(2).chunk(2)[rank] * 3
    gathered = torch.cat([sum(x.t() @ x for x in inputs)] * 2, -1)
    return {_layer: of_layer, _layer_of_products: (2 * gathered.chunk(2)[rank]) @ gathered.t()}


def _in_graphs(member, layer, backend, with_gradient):
    # A peer waits for as long as the other compiles.
    group = make_group(member, timeout=100.0)
    name, rank = group.unique_name, member.rank
    inputs = [torch.arange(24.0).reshape(6, 4) * (r + 1) - 20 for r in range(2)]
    x, want = inputs[rank], _of_layers(inputs, rank)[layer]
    if backend == "inductor":
        from torch._inductor import config

        config.compile_threads = 1
    # One rank's generated code meets the other's plain calls.
    backend = "aot_eager" if backend == "inductor" and rank == 1 else backend
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=with_gradient)
    got = [layer(x, name), compiled(x, name), compiled(x, name)]
    found = [torch.equal(y, want) and y.stride() == want.stride() for y in got]
    lost = ""
    if with_gradient:
        torch.compiler.reset()
        lost = _raised(compiled, x.clone().requires_grad_(), name)
        with torch.no_grad():
            found.append(torch.equal(compiled(x.clone().requires_grad_(), name), want))
    torch.compiler.reset()
    group.destroy()
    return found, lost, _raised(OPS.all_reduce, x, name)


def _in_all_graphs(member):
    # In one world: a process imports the compiler, and then Inductor, only once.
    whole = _in_graphs(member, _layer, "aot_eager", True)
    return *whole, _in_graphs(member, _layer_of_products, "inductor", False)[0]


def test_graphs_are_whole(on_ranks):
    for found, lost, destroyed, by_inductor in on_ranks(2, _in_all_graphs, timeout=110):
        assert found == [True] * 4
        assert "tcomm::all_reduce would lose the gradient of its input; call tcomm.functional" in lost
        assert destroyed.startswith("ConfigError: Group tp:")
        assert destroyed.endswith("is destroyed.")
        assert by_inductor == [True] * 3


@pytest.mark.stress
@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs g++ to write code for a CPU")
def test_code_that_inductor_writes_meets_plain_calls(on_ranks):
    for found, _, _ in on_ranks(2, _in_graphs, _layer, "inductor", False, timeout=110):
        assert found == [True] * 3


def _eager(member):
    group = make_group(member)
    name, rank = group.unique_name, member.rank
    inputs = [torch.arange(48.0).reshape(4, 2, 6) * (r + 1) for r in range(2)]
    x, total, found = inputs[rank], sum(inputs), []
    for dim in (0, 1, 2, -1):
        found.append(torch.equal(OPS.all_gather(x, dim, 2, name), torch.cat(inputs, dim)))
        found.append(torch.equal(OPS.reduce_scatter(x, dim, 2, name), total.chunk(2, dim)[rank]))
        found.append(torch.equal(ops.all_gather(x, dim, 2, name), torch.cat(inputs, dim)))
        found.append(torch.equal(ops.reduce_scatter(x, dim, 2, name), total.chunk(2, dim)[rank]))
    found.append(torch.equal(ops.all_reduce(x, name), total))
    with torch.inference_mode():
        found.append(torch.equal(OPS.all_reduce(x, name), total))
    needs = x.clone().requires_grad_()
    told = [
        _raised(OPS.all_gather, x, 0, 3, name),
        _raised(OPS.reduce_scatter, x, 0, 4, name),
        _raised(OPS.all_reduce, needs, name),
        _raised(OPS.all_gather, needs, 0, 2, name),
        _raised(OPS.reduce_scatter, needs, 0, 2, name),
        _raised(OPS.all_reduce, x, "tp:99"),
    ]
    with torch.no_grad():
        found.append(torch.equal(OPS.all_reduce(needs, name), total))
    group.destroy()
    return found, told


def test_ops_in_eager_code(on_ranks):
    for found, told in on_ranks(2, _eager):
        assert all(found)
        assert "tcomm::all_gather: world_size=3 is what the compiler was told" in told[0]
        assert "tcomm::reduce_scatter: world_size=4" in told[1]
        for text, op in zip(told[2:5], ("all_reduce", "all_gather", "reduce_scatter"), strict=True):
            assert f"ConfigError: tcomm::{op} would lose the gradient" in text
        assert told[5] == "UsageError: Group tp:99 is not found."


def test_torchs_own_checks_of_ops():
    """No argument changes or comes back, fakes are like results, and graphs of any shape are whole."""
    group = Group()
    x, name = torch.arange(24.0).reshape(6, 4).t(), group.unique_name
    for op, args in ((OPS.all_reduce, ()), (OPS.all_gather, (-1, 1)), (OPS.reduce_scatter, (0, 1))):
        assert set(torch.library.opcheck(op.default, (x, *args, name)).values()) == {"SUCCESS"}
    group.destroy()


def test_the_schemas_declare_no_mutation():
    for op in (OPS.all_reduce, OPS.all_gather, OPS.reduce_scatter):
        schema = op.default._schema
        assert not schema.is_mutable
        assert not any(value.alias_info for value in (*schema.arguments, *schema.returns))


def test_a_group_of_one_gives_memory_of_its_own():
    group = Alone()
    x = torch.arange(6.0).reshape(2, 3).t()
    for y in (
        OPS.all_reduce(x, group.unique_name),
        OPS.all_gather(x, 0, 1, group.unique_name),
        OPS.reduce_scatter(x, 1, 1, group.unique_name),
    ):
        assert torch.equal(x, y)
        assert y.data_ptr() != x.data_ptr()
        assert y.is_contiguous()


def test_fakes_have_the_shape_of_results():
    x = torch.empty(4, 6, 2, dtype=torch.bfloat16).permute(2, 0, 1)
    for fake, shape in (
        (ops.all_reduce_fake(x, ""), (2, 4, 6)),
        (ops.all_gather_fake(x, -1, 3, ""), (2, 4, 18)),
        (ops.reduce_scatter_fake(x, 1, 2, ""), (2, 2, 6)),
    ):
        assert (fake.shape, fake.dtype, fake.is_contiguous()) == (shape, x.dtype, True)
        assert fake.data_ptr() != x.data_ptr()
    needs = torch.ones(2, requires_grad=True)
    for fake, args in (
        (ops.all_reduce_fake, ()),
        (ops.all_gather_fake, (0, 2)),
        (ops.reduce_scatter_fake, (0, 2)),
    ):
        with pytest.raises(ConfigError, match=r"call tcomm\.functional instead"):
            fake(needs, *args, "")
    with pytest.raises(ConfigError, match="dim=3 of all_gather"):
        ops.all_gather_fake(x, 3, 2, "")


@pytest.mark.filterwarnings("ignore:.torch.jit")  # torch itself uses it for gradients of forward mode
def test_what_refuses_gradients():
    needs = torch.ones(2, requires_grad=True)
    with pytest.raises(ConfigError, match="tcomm::anything would lose the gradient"):
        ops.refuse_gradient("anything", None, torch.ones(1), needs)
    ops.refuse_gradient("anything", None, needs.detach())
    with torch.no_grad():
        ops.refuse_gradient("anything", needs)
    with forward_ad.dual_level(), pytest.raises(ConfigError, match="would lose a gradient of forward mode"):
        ops.refuse_gradient("anything", needs.detach())


@pytest.mark.filterwarnings("ignore:.torch.jit")  # torch itself uses it for gradients of forward mode
def test_torch_func_loses_no_gradient():
    group, x = Alone(), torch.ones(4)
    calls = [(OPS.all_reduce, ()), (OPS.all_gather, (0, 1)), (OPS.reduce_scatter, (0, 1))]
    for op, args in calls:

        def call(y, op=op, args=args):
            return op(y, *args, group.unique_name)

        assert call(x).tolist() == [1.0] * 4
        with pytest.raises(ConfigError, match="would lose the gradient of its input"):
            torch.func.grad(lambda y, call=call: call(y).sum())(x)
        with pytest.raises(ConfigError, match="would lose a gradient of forward mode"):
            torch.func.jvp(call, (x,), (x,))
        with forward_ad.dual_level(), pytest.raises(ConfigError, match="of forward mode"):
            call(forward_ad.make_dual(x, x))
