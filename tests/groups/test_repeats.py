"""What may go to a plan without another look, and what may not."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import tcomm
from tcomm.errors import ConfigError
from tcomm.groups import collective, repeats
from tcomm.groups.arguments import NOTHING, check_out, check_tensor, is_ordinary, is_plain
from tcomm.groups.pool import POOLED_BYTES
from tcomm.groups.repeats import Ready, find_repeat, make_repeat
from tcomm.memory.regions import Regions

SHAPE = torch.Size([4, 4])
NBYTES = 64
NOWHERE = Regions()


def _plan(x, out, timeout):
    """Never run here."""


def _make(shape, reach, x, out):
    return make_repeat(Ready(_plan, shape, reach, True, []), x, out, NOWHERE)


def _fits(x, out=None):
    repeat = _make(SHAPE, NBYTES, x, out)
    assert repeat.plan is _plan
    assert repeat.shape is None
    return repeat.fits


def _other_kinds(x):
    """Tensors that differ from a contiguous float32 [4, 4] in one thing."""
    with torch.inference_mode():
        frozen = x.clone()
    freed = [*torch.ones(2, *SHAPE)]
    freed[0].untyped_storage().resize_(0)
    jagged = torch.nested.nested_tensor([x, x], layout=torch.jagged)
    return {
        "shape": x.view(2, 8),
        "strides": x.t(),
        "dtype": x.double(),
        "bits of another dtype": x.view(torch.int32),
        "device": x.to("meta"),
        "gradient": x.clone().requires_grad_(),
        "graph": x.clone().requires_grad_() * 2,
        "subclass": torch.nn.Parameter(x, requires_grad=False),
        "negated": torch._neg_view(x),
        "inference": frozen,
        "expanded": x[:1].expand(4, 4),
        "storage": freed[0],
        "storage, not at its beginning": freed[1],
        "zero": torch._efficientzerotensor((4, 4)),
        "functional": torch._to_functional_tensor(x),
        "sparse": x.to_sparse(),
        "sparse rows": x.to_sparse_csr(),
        "sparse columns": x.to_sparse_csc(),
        "sparse blocks": x.to_sparse_bsr((2, 2)),
        "mkldnn": x.to_mkldnn() if torch.backends.mkldnn.is_available() else jagged,
        "nested": torch.nested.nested_tensor([x, x]),
        "jagged": jagged,
        "a list": [1.0],
        "nothing": None,
    }


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:Sparse", "ignore:.*beta state")
def test_tensors_like_the_first_fit_and_every_other_kind_does_not():
    x, out = torch.ones(SHAPE), torch.ones(SHAPE)
    alone, in_place, apart = _fits(x), _fits(x, x), _fits(x, out)
    same = torch.zeros(SHAPE)
    assert alone(same, None)
    assert in_place(same, same)
    assert apart(same, x)
    for kind, other in _other_kinds(x).items():
        for fits, tensors in [
            (alone, (other, None)),
            (in_place, (other, other)),
            (apart, (other, out)),
            (apart, (x, other)),
        ]:
            try:
                assert not fits(*tensors), kind
            except (AttributeError, TypeError, RuntimeError):
                assert not isinstance(other, torch.Tensor), kind


def test_where_the_result_goes_has_to_be_as_it_was():
    memory = torch.ones(2, *SHAPE)
    x, out = memory
    alone, in_place, apart = _fits(x), _fits(x, x), _fits(x, out)
    assert not alone(x, out)
    assert not alone(x, x)
    assert not in_place(x, out)
    assert not in_place(x, None)
    # A pair that was apart is known, and is not another pair.
    for first, second in [(x, out), (x, out), (out, x)]:
        assert apart(first, second)
        assert not apart(x, None)
        assert not apart(x, x)
        assert not apart(out, out)
        # One row of the result is one of the input.
        assert not apart(x, memory.view(8, 4)[3:7])
        for overlapped in (x, x, out, out):
            assert not apart(memory.view(8, 4)[3:7], overlapped)


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("freed", [[0], [1], [0, 1]])
@pytest.mark.parametrize("looks", [0, 3])
def test_a_pair_has_to_have_memory_at_its_first_look_and_at_every_other(row, freed, looks):
    pair = [torch.ones(2, *SHAPE)[row], torch.ones(2, *SHAPE)[row]]
    apart = _fits(*pair)
    assert [bool(apart(*pair)) for _ in range(looks)] == [True] * looks
    for index in freed:
        pair[index].untyped_storage().resize_(0)
    assert not apart(*pair)


def test_a_few_pairs_in_turn_are_known_and_of_many_the_last(monkeypatch):
    slow, check = [], torch.Tensor.storage_offset
    monkeypatch.setattr(torch.Tensor, "storage_offset", lambda x: (slow.append(1), check(x))[1])
    pairs = [(torch.ones(SHAPE), torch.ones(SHAPE)) for _ in range(repeats._MAX_KNOWN + 1)]
    apart = _fits(*pairs[0])

    def looks(number):
        slow.clear()
        assert all(apart(*pair) for pair in pairs[:number])
        return len(slow) // 2

    assert looks(repeats._MAX_KNOWN) == repeats._MAX_KNOWN
    assert looks(repeats._MAX_KNOWN) == 0
    assert looks(repeats._MAX_KNOWN + 1) == 1
    assert looks(1) == 1


def test_places_that_a_view_of_freed_memory_may_have_are_looked_at_every_time(monkeypatch):
    monkeypatch.setattr(repeats, "_guard", lambda *_tensors: lambda *_others: True)
    fits = repeats._like_two(torch.ones(SHAPE), torch.ones(SHAPE), NBYTES)

    def tensor(address, offset):
        return SimpleNamespace(is_nested=False, data_ptr=lambda: address, storage_offset=lambda: offset)

    far = tensor(1 << 46, 0)
    assert fits(tensor(4096, 0), far)
    assert not fits(tensor(4096, 1024), far)
    assert fits(far, tensor(4096, 0))
    assert not fits(far, tensor(4096, 1024))


def test_a_barrier_is_known_by_its_tensor_of_nobody():
    fits = _make(NOTHING.shape, 0, NOTHING, NOTHING).fits
    assert fits(NOTHING, NOTHING)
    empty = torch.empty(0)
    assert not fits(empty, empty)
    assert not fits(NOTHING, empty)
    assert not fits(empty, NOTHING)
    assert not fits(NOTHING, None)
    with torch.inference_mode():
        assert _make(NOTHING.shape, 0, NOTHING, NOTHING).fits(NOTHING, NOTHING)
    with FakeTensorMode():
        assert not fits(NOTHING, NOTHING)
    seen = []
    torch.func.vmap(lambda x: (seen.append(bool(fits(NOTHING, NOTHING))), x)[1])(torch.ones(2))
    assert seen == [False]


def test_tensors_without_elements_have_no_memory_and_fit():
    empty = torch.empty(0, 4)
    assert _make(empty.shape, 0, empty, empty).fits(empty, empty)
    assert _make(empty.shape, 0, empty, None).fits(torch.empty(0, 4), None)


def test_results_like_x_are_made_like_it_unless_their_memory_is_kept():
    x, long = torch.ones(SHAPE), torch.empty(POOLED_BYTES // 4)
    assert _make(torch.Size([8, 4]), 128, x, None).shape == (8, 4)
    assert _make(torch.Size([2, 8]), NBYTES, x, None).shape == (2, 8)
    assert _make(long.shape, POOLED_BYTES, long, None).shape == long.shape
    assert _make(long[1:].shape, POOLED_BYTES - 4, long[1:], None).shape is None


def test_what_is_not_ordinary_and_contiguous_is_checked_every_time():
    x = torch.ones(SHAPE)
    for other in (x.t(), torch.nn.Parameter(x), torch._neg_view(x), x.clone().requires_grad_()):
        assert _make(SHAPE, NBYTES, other, None) is None
        assert _make(SHAPE, NBYTES, other, other) is None
        assert _make(SHAPE, NBYTES, x, other) is None
    with FakeTensorMode():
        assert _make(SHAPE, NBYTES, x, None) is None


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def _dual_level(observe):
    with forward_ad.dual_level():
        observe(torch.ones(SHAPE))


def _inside(context):
    def run(observe):
        with context():
            observe(torch.ones(SHAPE))

    return run


@pytest.mark.parametrize(
    "run",
    [
        lambda observe: torch.func.vmap(observe)(torch.ones(2, *SHAPE)),
        lambda observe: torch.func.grad(observe)(torch.ones(SHAPE)),
        lambda observe: torch.func.jvp(observe, (torch.ones(SHAPE),), (torch.ones(SHAPE),)),
        lambda observe: torch.func.functionalize(observe)(torch.ones(SHAPE)),
        lambda observe: make_fx(observe)(torch.ones(SHAPE)),
        lambda observe: make_fx(observe, pre_dispatch=True)(torch.ones(SHAPE)),
        lambda observe: torch.jit.trace(observe, (torch.ones(SHAPE),), check_trace=False),
        _inside(forward_ad.dual_level),
        _inside(FakeTensorMode),
        _inside(_Mode),
        _inside(torch.inference_mode),
    ],
)
@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore:.*torch.jit.trace", "ignore:Accessing the data")
def test_nothing_fits_in_a_mode_a_transform_or_a_tracer(run):
    outer, out, seen = torch.ones(SHAPE), torch.ones(SHAPE), []
    alone, in_place, apart = _fits(outer), _fits(outer, outer), _fits(outer, out)

    def observe(x):
        for tensor in (x, outer):
            calls = [(alone, (tensor, None)), (in_place, (tensor, tensor)), (apart, (tensor, out))]
            for fits, tensors in calls:
                try:
                    seen.append(bool(fits(*tensors)))
                except (AttributeError, TypeError, RuntimeError):
                    seen.append(False)
        return x.sum()

    run(observe)
    assert seen == [False] * 6
    assert alone(outer, None)
    assert in_place(outer, outer)
    assert apart(outer, out)


def _tensor(kind):
    with torch.inference_mode() if kind == "frozen" else torch.inference_mode(False):
        return torch.ones(SHAPE, requires_grad=kind == "gradient")


def _passes(x, out):
    try:
        check_tensor("all_reduce", x)
        if out is not None:
            check_out("all_reduce", x, out, SHAPE)
    except ConfigError:
        return False
    return is_plain(x)


def _any_call():
    """By name: mode, kind of x, and the result: none, x, or another tensor of a kind."""
    modes = {
        "grad": torch.enable_grad,
        "no grad": torch.no_grad,
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu"),
    }
    kinds = ("plain", "frozen", "gradient")
    for mode, kind, other in itertools.product(modes, kinds, ("none", "x", *kinds)):
        x = _tensor(kind)
        out = None if other == "none" else x if other == "x" else _tensor(other)
        yield (mode, kind, other), modes[mode], x, out


def test_what_fits_would_pass_the_checks_in_every_mode_of_autograd():
    fitting = 0
    for made, mode, x, out in _any_call():
        with mode():
            repeat = _make(SHAPE, NBYTES, x, out) if _passes(x, out) else None
        for called, other_mode, mine, theirs in _any_call() if repeat is not None else []:
            with other_mode():
                if repeat.fits(mine, theirs):
                    fitting += 1
                    assert _passes(mine, theirs), (made, called)
                    assert is_ordinary(mine)
    assert fitting > 20


def test_a_result_in_symmetric_memory_is_known_by_its_place():
    class Here(Regions):
        def find_name(self, out):
            return "here" if out is placed else ""

    x, placed, elsewhere = (torch.ones(SHAPE) for _ in range(3))
    ready = Ready(_plan, SHAPE, NBYTES, True, [])
    repeat = make_repeat(ready, x, placed, Here())
    assert find_repeat(ready.repeats, x, placed, Here()) is repeat
    assert find_repeat(ready.repeats, x, elsewhere, Here()) is None
    assert find_repeat(ready.repeats, x, placed, NOWHERE) is None


def test_a_kind_of_call_keeps_the_last_few_that_passed():
    x, out = torch.ones(SHAPE), torch.ones(SHAPE)
    ready = Ready(_plan, SHAPE, NBYTES, True, [])
    alone, in_place, apart = (make_repeat(ready, x, y, NOWHERE) for y in (None, x, out))
    assert find_repeat(ready.repeats, out, None, NOWHERE) is alone
    assert find_repeat(ready.repeats, out, out, NOWHERE) is in_place
    assert find_repeat(ready.repeats, out, x, NOWHERE) is apart
    assert find_repeat(ready.repeats, x.t(), None, NOWHERE) is None
    assert find_repeat(ready.repeats, x, [1.0], NOWHERE) is None
    for _ in range(3):
        in_place = make_repeat(ready, x, x, NOWHERE)
    assert len(ready.repeats) == 4
    assert find_repeat(ready.repeats, x, None, NOWHERE) is None
    assert find_repeat(ready.repeats, x, out, NOWHERE) is apart


def test_a_call_is_checked_once_and_again_when_it_is_another(monkeypatch):
    checked = []

    def make(ready, x, out, regions):
        checked.append(tuple(x.shape))
        return make_repeat(ready, x, out, regions)

    monkeypatch.setattr(collective, "make_repeat", make)
    with tcomm.Communicator() as comm:
        x, out = torch.arange(16.0).view(SHAPE), torch.empty(SHAPE)

        def count(*args, **kwargs):
            before = len(checked)
            y = comm.all_reduce(*args, **kwargs)
            assert y.equal(args[0])
            assert y is kwargs.get("out", y)
            return len(checked) - before

        assert count(x, out=out)
        assert [count(x, out=out), count(x + 1, out=torch.empty(SHAPE)), count(out, out=x)] == [0, 0, 0]
        assert count(x.view(2, 8), out=torch.empty(2, 8))
        assert count(x, out=out) == 0
        assert count(x)
        assert [count(x), count(x + 1)] == [0, 0]
        # Two kinds of as many elements in turn.
        assert count(x.view(2, 8)) == 1
        assert [count(t) for t in (x, x.view(2, 8), x, x.view(2, 8))] == [0, 0, 0, 0]
        assert comm.all_reduce(x, async_op=True).wait().equal(x)
        assert [count(x), count(x, out=out), count(x)] == [0, 0, 0]
        assert count(x, "max")
        assert [count(x), count(x, "max"), count(x, timeout=3.0)] == [0, 0, 0]
        with pytest.raises(ConfigError, match="timeout -1 is not"):
            comm.all_reduce(x, timeout=-1)
        comm.prepare(1024)
        assert count(x)
        assert count(x) == 0
    with pytest.raises(tcomm.GroupClosedError):
        comm.all_reduce(x)
