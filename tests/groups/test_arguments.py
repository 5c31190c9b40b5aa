import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from tcomm.errors import ConfigError
from tcomm.groups.arguments import (
    check_dim,
    check_out,
    check_rank,
    check_sizes,
    check_splits,
    check_tensor,
    dtype_name,
    has_tangent,
    is_ordinary,
    overlaps,
    refuse_tracers,
    refuse_unequal_splits,
)
from tcomm.signature import CallDescription


def _message(function, *args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def test_dtypes_go_by_their_short_name():
    assert [dtype_name(d) for d in (torch.float32, torch.bfloat16)] == ["float32", "bfloat16"]


def test_a_gradient_may_be_lost_only_where_none_is_recorded():
    x = torch.ones(3, requires_grad=True)
    assert _message(check_tensor, "send", x) == (
        "send would lose the gradient of its input; call it under torch.no_grad() or on x.detach()"
    )
    assert check_tensor("send", x, loses_gradient=False) is x
    with torch.no_grad():
        assert check_tensor("send", x) is x
    assert _message(check_tensor, "send", None) == "send takes a torch.Tensor, not NoneType"
    assert _message(check_tensor, "send", torch.eye(3).to_sparse()) == (
        "send takes a dense tensor, not one of layout torch.sparse_coo; call .to_dense() first"
    )


def test_what_has_outlived_its_transform_is_refused():
    kept = []
    torch.func.vmap(lambda row: kept.append(row) or row)(torch.ones(2, 3))
    assert not is_ordinary(kept[0])
    assert "takes a tensor with memory" in _message(check_tensor, "send", kept[0])
    torch.func.grad(lambda x: kept.append(x) or x.sum())(torch.ones(3))
    assert "send would lose the gradient" in _message(check_tensor, "send", kept[1])


def test_a_tensor_whose_memory_was_freed_is_refused():
    x = torch.ones(3)
    x.untyped_storage().resize_(0)
    assert not is_ordinary(x)
    assert _message(check_tensor, "send", x) == (
        "send takes a tensor with memory; that of this one was freed, or never there"
    )
    parts = [*torch.ones(2, 3)]
    parts[0].untyped_storage().resize_(0)
    zero = torch._efficientzerotensor((3,))
    for other in (parts[1], zero, torch._to_functional_tensor(torch.ones(3))):
        assert not is_ordinary(other)
        assert "takes a tensor with memory" in _message(check_tensor, "send", other)
    empty = torch.empty(0)
    assert is_ordinary(empty)
    assert check_tensor("send", empty) is empty
    assert check_tensor("send", x.to("meta")).is_meta


@pytest.mark.filterwarnings("ignore:.torch.jit")  # torch itself uses it for gradients of forward mode
def test_a_gradient_of_forward_mode_is_one_too():
    x = torch.ones(3)
    assert not has_tangent(x)
    with forward_ad.dual_level():
        assert not is_ordinary(x)
        assert not has_tangent(x)
        assert check_tensor("send", x) is x
        dual = forward_ad.make_dual(x, x)
        assert has_tangent(dual)
        assert _message(check_tensor, "send", dual) == (
            "send would lose the forward-mode gradient of its input; call it on unpack_dual(x).primal, and "
            "again on its tangent where the verb is linear"
        )
        assert check_tensor("send", dual, loses_gradient=False) is dual
    assert is_ordinary(x)


def _observed(x):
    """What is said inside of a tracer or transform, whose own result does not count."""
    seen = [is_ordinary(x), _message(check_tensor, "send", x), _message(refuse_tracers, "send")]
    raise LookupError(*seen)


@pytest.mark.parametrize(
    ("trace", "told"),
    [
        (lambda: torch.func.vmap(_observed)(torch.ones(2, 3)), "inside of vmap of torch.func"),
        (lambda: torch.func.grad(_observed)(torch.ones(3)), "inside of grad of torch.func"),
        (
            lambda: torch.func.jvp(_observed, (torch.ones(3),), (torch.ones(3),)),
            "inside of jvp of torch.func",
        ),
        (lambda: torch.func.functionalize(_observed)(torch.ones(3)), "inside of functionalize of torch.func"),
        (lambda: make_fx(_observed)(torch.ones(3)), "missing in what make_fx"),
        (lambda: make_fx(_observed, pre_dispatch=True)(torch.ones(3)), "missing in what make_fx"),
    ],
)
@pytest.mark.filterwarnings("ignore:.torch.jit")  # torch itself uses it for gradients of forward mode
def test_tracers_and_transforms_are_told_apart_from_plain_calls(trace, told):
    with pytest.raises(LookupError) as caught:
        trace()
    ordinary, of_tensor, of_moment = caught.value.args
    assert not ordinary
    assert told in of_tensor
    assert of_tensor == of_moment
    assert is_ordinary(torch.ones(3))
    assert refuse_tracers("send") is None


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_modes_without_memory_are_refused_and_others_are_not():
    x = torch.ones(3)
    with FakeTensorMode():
        assert not is_ordinary(x)
        assert _message(check_tensor, "send", x) == (
            "send cannot run in FakeTensorMode, whose tensors have no memory"
        )
    with torch.device("meta"):
        assert not is_ordinary(x)
        assert check_tensor("send", x) is x
    assert not is_ordinary(torch.nn.Parameter(x))
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    assert _message(check_tensor, "send", nested) == (
        "send takes a dense tensor, not a nested one; give x.to_padded_tensor(0.0) or x.unbind()"
    )


@pytest.mark.parametrize(
    ("x", "out", "expected"),
    [
        ((0, 4, 1), (4, 4, 1), False),
        ((0, 4, 1), (3, 4, 1), True),
        ((3, 4, 1), (0, 4, 1), True),
        ((0, 4, 1), (0, 4, 1), False),
        ((0, 4, 1), (0, 3, 1), True),
        ((0, 4, 2), (1, 4, 2), True),
        ((0, 4, 2), (8, 4, 2), False),
        ((0, 1, 1), (1, 1, 1), False),
        ((2, 0, 1), (2, 4, 1), False),
    ],
)
def test_overlap_is_a_matter_of_extents(x, out, expected):
    base = torch.zeros(32)
    views = [base.as_strided((length,), (stride,), start) for start, length, stride in (x, out)]
    assert overlaps(*views) is expected
    assert not overlaps(views[0], torch.zeros(4))


def test_an_output_is_compared_with_what_is_needed():
    x = torch.zeros(2, 3)
    check_out("all_reduce", x, torch.empty(3, 2).t(), (2, 3))
    check_out("all_gather_single", x, torch.empty(4, 3), (4, 3))
    assert _message(check_out, "all_gather_single", x, torch.empty(2, 3), (4, 3)) == (
        "out= of all_gather_single is float32 [2, 3] on cpu; needed float32 [4, 3] on cpu"
    )
    assert _message(check_out, "all_reduce", x, torch.empty(2, 3, device="meta"), (2, 3)) == (
        "out= of all_reduce is float32 [2, 3] on meta; needed float32 [2, 3] on cpu"
    )
    assert _message(check_out, "all_reduce", x, x[:1].expand(2, 3), (2, 3)) == (
        "out= of all_reduce overlaps the input without being the input; give other memory"
    )


@pytest.mark.parametrize("rank", [2, -1, "0", None, 1.0])
def test_a_rank_that_is_not_in_the_group_is_refused(rank):
    assert _message(check_rank, "send", "dst", rank, 2) == (
        f"dst={rank!r} of send is not a rank of this group; ranks are 0 to 1"
    )


def test_a_rank_does_not_send_to_itself():
    check_rank("broadcast", "root", 1, 2)
    check_rank("send", "dst", 1, 2, myself=0)
    assert _message(check_rank, "send", "dst", 1, 2, 1) == "dst=1 of send is this rank itself; name another"


def test_a_rank_is_a_plain_number():
    assert type(check_rank("broadcast", "root", True, 2)) is int


@pytest.mark.parametrize(("dim", "index"), [(0, 0), (2, 2), (-1, 2), (-3, 0), (np.int64(1), 1), (True, 1)])
def test_dimensions_are_counted_from_the_front(dim, index):
    assert check_dim("gather", (4, 5, 6), dim) == index


@pytest.mark.parametrize(
    ("shape", "dim", "told"),
    [
        ((), 0, "gather of a 0-d tensor has no dimension to go along; reshape(1)"),
        ((4, 5), 2, "dim=2 of gather: a tensor of shape [4, 5] has dimensions -2 to 1"),
        ((4, 5), -3, "dim=-3 of gather: a tensor of shape [4, 5] has dimensions -2 to 1"),
        ((4, 5), 1.0, "dim=1.0 of gather is no integer"),
        ((4, 5), None, "dim=None of gather is no integer"),
    ],
)
def test_a_dimension_that_is_not_there_is_refused(shape, dim, told):
    assert _message(check_dim, "gather", shape, dim) == told


def test_sizes_are_plain_numbers_of_all_ranks():
    assert check_sizes("sizes", torch.tensor([2, 0]), 2) == (2, 0)
    assert [type(n) for n in check_sizes("sizes", [True, np.int32(4)], 2)] == [int, int]


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ([1], "sizes has 1 entries; needed one for each of 2 ranks"),
        ([1, -2], "sizes=[1, -2] has a negative entry"),
        ([1, 2.0], "sizes=[1, 2.0] has entries that are no integers"),
        (3, "sizes=3 has entries that are no integers"),
        (None, "sizes=None has entries that are no integers"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, told):
    assert _message(check_sizes, "sizes", sizes, 2) == told


def test_an_output_may_be_the_input_only_where_that_is_said():
    x = torch.zeros(4)
    check_out("broadcast", x, x, (4,))
    check_out("all_gather_single", x, torch.zeros(0), (0,), may_alias=False)
    parts = "is the input, and its parts do not stay where they are; give other memory"
    assert _message(check_out, "all_to_all_single", x, x, (4,), False) == f"out= of all_to_all_single {parts}"
    overlap = "overlaps the input without being the input; give other memory"
    assert _message(check_out, "scatter", x, x[:2], (2,), False) == f"out= of scatter {overlap}"


def test_splits_are_as_given_or_equal():
    assert check_splits("send_splits", None, 6, 3) == (2, 2, 2)
    assert check_splits("send_splits", [0, 6, 0], 6, 3) == (0, 6, 0)


@pytest.mark.parametrize(
    ("splits", "rows", "told"),
    [
        (None, 7, "7 rows do not divide among 3 ranks; give send_splits="),
        ([1, 2], 3, "send_splits has 2 entries; needed one for each of 3 ranks"),
        ([4, -1, 0], 3, "send_splits=[4, -1, 0] has a negative entry"),
        ([1, 1, 2], 3, "send_splits=[1, 1, 2] adds up to 4; the tensor has 3 rows"),
    ],
)
def test_splits_that_do_not_fit_are_refused(splits, rows, told):
    assert _message(check_splits, "send_splits", splits, rows, 3) == told


def test_every_pair_that_disagrees_is_named():
    calls = [
        CallDescription("all_to_all_single", send_splits=(1, 2), recv_splits=(1, 0)),
        CallDescription("all_to_all_single", send_splits=(3, 4), recv_splits=(2, 5)),
    ]
    assert refuse_unequal_splits(calls) == [
        "rank 1 sends 3 rows to rank 0, which expects 0",
        "rank 1 sends 4 rows to rank 1, which expects 5",
    ]


def test_who_expects_nothing_takes_what_comes():
    calls = [
        CallDescription("all_to_all_single", send_splits=(1, 2)),
        CallDescription("all_to_all_single", send_splits=(3, 4), recv_splits=(9, 4)),
    ]
    assert refuse_unequal_splits(calls) == ["rank 0 sends 2 rows to rank 1, which expects 9"]
