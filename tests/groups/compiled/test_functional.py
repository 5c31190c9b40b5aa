"""Collectives that autograd knows: values, gradients and their gradients, in graphs too."""

import itertools

import pytest
import torch

import tcomm
from tcomm.errors import ConfigError
from tcomm.groups.compiled import functional
from tests.groups.compiled.groups import Alone, Group, make_group
from tests.groups.verbs import join

SHAPE = (4, 2)


def _chunks(xs, dim=0):
    return [x.chunk(len(xs), dim) for x in xs]


UNSHARDED = {
    "all_reduce": (lambda xs, op="sum": [sum(xs) / (1 if op == "sum" else len(xs))] * len(xs)),
    "all_gather": (lambda xs, dim=0: [torch.cat(xs, dim)] * len(xs)),
    "reduce_scatter": (
        lambda xs, dim=0, op="sum": sum(xs).div(1 if op == "sum" else len(xs)).chunk(len(xs), dim)
    ),
    "all_to_all": (lambda xs: [torch.cat(column) for column in zip(*_chunks(xs), strict=True)]),
    "broadcast": (lambda xs, src=0: [xs[src] + 0 * sum(xs)] * len(xs)),
}
"""What each gives to every rank, of all ranks' inputs in one process."""
CASES = [
    ("all_reduce", ()),
    ("all_reduce", ("avg",)),
    ("all_gather", ()),
    ("all_gather", (-1,)),
    ("reduce_scatter", (0, "avg")),
    ("reduce_scatter", (1,)),
    ("all_to_all", ()),
    ("broadcast", ()),
    ("broadcast", (1,)),
]


def _loss(rank, y):
    """Another one on each rank, with a second derivative."""
    return ((y + rank + 1) ** 3).sum() * (rank + 2)


def _first_and_second(loss, xs):
    """Gradients of the loss, and of the sum of their squares."""
    first = torch.autograd.grad(loss, xs, create_graph=True)
    second = torch.autograd.grad(sum((g**2).sum() for g in first), xs)
    return first, second


def _gradients(member):
    group, rank, world = make_group(member), member.rank, member.world_size
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(world)]
    found = []
    groups = [group.unique_name, group, group.device_communicator, group.device_communicator.communicator]
    for (verb, args), given in zip(CASES, itertools.cycle(groups), strict=False):
        xs = [x.clone().requires_grad_() for x in leaves]
        ys = UNSHARDED[verb](xs, *args)
        want = _first_and_second(sum(_loss(r, y) for r, y in enumerate(ys)), xs)
        # Not contiguous, as a transposed weight.
        x = leaves[rank].t().contiguous().t().requires_grad_()
        y = getattr(functional, verb)(x, given, *args)
        first, second = _first_and_second(_loss(rank, y), [x])
        close = [
            torch.allclose(got, expected)
            for got, expected in ((y, ys[rank]), (first[0], want[0][rank]), (second[0], want[1][rank]))
        ]
        found.append("" if all(close) else f"{verb}{args}: value and two gradients: {close}")
        found.append(_numeric(member, group.unique_name, verb, args, leaves, first[0]))
    group.destroy()
    return join(found)


def _numeric(member, name, verb, args, leaves, gradient):
    """What the sum of all ranks' losses gains along some direction, one rank's input after another."""
    rank, step, direction = member.rank, 1e-5, torch.arange(1.0, 9.0, dtype=torch.float64).view(SHAPE)
    slopes = []
    for source in range(member.world_size):
        losses = []
        for sign in (1, -1):
            x = leaves[rank] + sign * step * direction * (source == rank)
            with torch.no_grad():
                losses.append(_loss(rank, getattr(functional, verb)(x, name, *args)))
        slopes.append((losses[0] - losses[1]) / (2 * step))
    slope, told = functional.all_reduce(torch.stack(slopes), name)[rank], (gradient * direction).sum()
    return (
        "" if torch.allclose(slope, told, rtol=1e-6) else f"{verb}{args}: {slope} by differences, not {told}"
    )


def test_gradients_are_those_of_the_sum_of_losses(on_ranks):
    assert on_ranks(2, _gradients) == [[]] * 2


def _layer(x, columns, rows, group):
    """A layer split by columns and one by rows, of which every rank has the whole result."""
    hidden = (functional.copy_to_group(x, group) @ columns).tanh()
    return functional.reduce_from_group(hidden @ rows, group)


def _tensor_parallel(member, group):
    """One loss that counts once; the model in one process is what the ranks have to agree with."""
    rank, world = member.rank, member.world_size
    generator, found = torch.Generator().manual_seed(1), []
    x, columns, rows = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((3, 4), (4, 6), (6, 2))
    )
    whole = ((x @ columns).tanh() @ rows).pow(2).sum()
    want = torch.autograd.grad(whole, [x, columns, rows])
    expected = [want[0], want[1].chunk(world, 1)[rank], want[2].chunk(world, 0)[rank]]
    for layer in (_layer, torch.compile(_layer, fullgraph=True, backend="aot_eager")):
        mine = [x, columns.chunk(world, 1)[rank], rows.chunk(world, 0)[rank]]
        mine = [value.detach().clone().requires_grad_() for value in mine]
        loss = layer(*mine, group.unique_name).pow(2).sum()
        found += [torch.allclose(loss, whole)]
        found += map(torch.allclose, torch.autograd.grad(loss, mine), expected)
    return found


def _all_verbs(x, name):
    y = functional.all_reduce(x, name, "avg")
    y = functional.all_gather(y, name, 1)
    y = functional.reduce_scatter(y.sin(), name, 1)
    return functional.broadcast(functional.all_to_all(y, name), name, 1)


def _in_graphs(member):
    group = make_group(member)
    x = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(member.rank))
    results = []
    for call in (_all_verbs, torch.compile(_all_verbs, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        y = call(leaf, group.unique_name)
        results.append((y.detach(), *torch.autograd.grad(_loss(member.rank, y), leaf)))
    trained = _tensor_parallel(member, group)
    torch.compiler.reset()
    group.destroy()
    return [torch.equal(a, b) for a, b in zip(*results, strict=True)], trained


def test_graphs_are_whole_and_train_a_split_layer(on_ranks):
    for same, trained in on_ranks(2, _in_graphs):
        assert same == [True, True]
        assert trained == [True] * 8


def test_torchs_own_checks_of_ops():
    group, ops = Group(), torch.ops.tcomm_functional
    x, name = torch.ones(2, 3, requires_grad=True), group.unique_name
    for op, args in (
        (ops.all_reduce, ("sum",)),
        (ops.all_gather, (1,)),
        (ops.reduce_scatter, (1, "avg")),
        (ops.all_to_all, ()),
        (ops.broadcast, (0,)),
        (ops.reduce_to, (0,)),
        (ops.reduce_from_group, ()),
    ):
        assert set(torch.library.opcheck(op.default, (x, name, *args)).values()) == {"SUCCESS"}
    group.destroy()


def test_other_operations_are_refused():
    group = Alone()
    x = torch.ones(2, requires_grad=True)
    for verb in ("all_reduce", "reduce_scatter"):
        with pytest.raises(
            ConfigError, match=rf"tcomm.functional.{verb} knows the gradient of sum and avg, not"
        ):
            getattr(functional, verb)(x, group, op="max")
    with pytest.raises(ConfigError, match="src=1 of broadcast is not a rank"):
        functional.broadcast(x, group, 1)
    with pytest.raises(ConfigError, match="is no group"):
        functional.all_reduce(x, None)


@pytest.mark.filterwarnings("ignore:.torch.jit")  # torch itself uses it for gradients of forward mode
def test_gradients_of_forward_mode_are_refused():
    group, x = Alone(), torch.ones(2)
    for call in (torch.func.vmap(lambda y: functional.all_reduce(y, group)), functional.all_gather):
        args = (x[None],) if call is not functional.all_gather else (x, group)
        with pytest.raises(ConfigError, match="has no gradient of forward mode"):
            torch.func.jvp(lambda y, call=call, args=args: call(y, *args[1:]), args[:1], args[:1])


def test_arguments_are_checked_before_an_op_sees_them():
    group, x = Alone(), torch.ones(2, 2)
    for verb in functional.__all__:
        for wrong in (None, [1], 3.0):
            with pytest.raises(ConfigError, match=rf"tcomm.functional.{verb} takes a torch.Tensor, not"):
                getattr(functional, verb)(wrong, group)
    for verb in ("all_gather", "reduce_scatter"):
        for wrong in (None, 1.5, "x", 9, True):
            with pytest.raises(ConfigError, match=rf"dim={wrong!r} of tcomm.functional.{verb}"):
                getattr(functional, verb)(x, group, wrong)
    for wrong in (None, 1.5, "x", True):
        with pytest.raises(ConfigError, match=rf"src={wrong!r} of tcomm.functional.broadcast"):
            functional.broadcast(x, group, wrong)


def test_a_group_of_one():
    x = torch.arange(4.0, dtype=torch.float64).requires_grad_()
    with tcomm.Communicator() as alone:
        for verb in functional.__all__:
            y = getattr(functional, verb)(x, alone)
            assert torch.equal(x, y)
            assert torch.equal(torch.autograd.grad((y**2).sum(), x)[0], 2 * x)
            assert torch.equal(functional.copy_to_group(x, alone), x)
