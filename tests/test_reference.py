"""The meaning itself, against arithmetic done by hand; and the random data that other tests reduce."""

import pytest
import torch

from tcomm import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64)
INT_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def every_ranks_input(seed, world_size, shape, dtype, special=False):
    """One tensor per rank; the same list in every process that gives the same seed."""
    generator = torch.Generator().manual_seed(seed)
    # Every rank draws every rank's data: all at once.
    tensors = _random(generator, (world_size, *shape), dtype)
    if special and dtype.is_floating_point:
        values = _special_values(dtype)
        flat = tensors.view(-1)
        picks = torch.randint(0, len(values), (flat.numel(),), generator=generator)
        chosen = torch.rand(flat.numel(), generator=generator) < 0.3
        flat[chosen] = values[picks[chosen]]
    return [tensor.clone() for tensor in tensors]


def _random(generator, shape, dtype):
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        return torch.randint(info.min, info.max, shape, generator=generator, dtype=dtype)
    scale = torch.randint(-3, 4, shape, generator=generator).to(torch.float64)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * torch.exp2(scale)
    return values.to(dtype)


def _special_values(dtype):
    """Infinities, NaN, both zeros, the largest, the smallest, and halves that end in a tie when added."""
    info = torch.finfo(dtype)
    one = 1.0
    values = [float("inf"), float("-inf"), float("nan"), 0.0, -0.0, info.max, info.min, info.tiny, -info.tiny]
    values += [one + info.eps, -one - info.eps, info.eps / 2, -info.eps / 2, one, -one, 3.0, -3.0]
    return torch.tensor(values, dtype=torch.float64).to(dtype)


def difference(got, want, op="sum"):
    """What is wrong with `got`; empty when it has the bits of `want`, but for NaN and for zeros of max."""
    if (got.shape, got.dtype) != (want.shape, want.dtype):
        return f"{got.dtype} {list(got.shape)} instead of {want.dtype} {list(want.shape)}"
    bits = INT_BITS[got.dtype.itemsize]
    same = got.contiguous().view(-1).view(bits) == want.contiguous().view(-1).view(bits)
    flat_got, flat_want = got.reshape(-1), want.reshape(-1)
    same |= (flat_got != flat_got) & (flat_want != flat_want)
    if op in {"max", "min"}:
        same |= (flat_got == 0) & (flat_want == 0)
    wrong = (~same).nonzero().view(-1).tolist()
    if not wrong:
        return ""
    first = wrong[0]
    return f"{len(wrong)} of {got.numel()} differ, first [{first}]: {flat_got[first]} for {flat_want[first]}"


def _reduced(rows, op, dtype):
    results = reference.all_reduce([torch.tensor(row, dtype=dtype) for row in rows], op)
    assert len(results) == len(rows)
    assert all(difference(result, results[0]) == "" for result in results)
    return results[0]


@pytest.mark.parametrize(
    ("op", "expected"), [("sum", [11, 22]), ("max", [10, 20]), ("min", [1, 2]), ("avg", [5.5, 11.0])]
)
def test_two_ranks_give_the_numbers_of_the_docstrings(op, expected):
    assert _reduced([[1, 2], [10, 20]], op, torch.float32).tolist() == expected


def test_sums_go_in_rank_order():
    assert _reduced([[1.0], [1e8], [-1e8]], "sum", torch.float32).item() == 0.0
    assert _reduced([[1e8], [-1e8], [1.0]], "sum", torch.float32).item() == 1.0


@pytest.mark.parametrize(("dtype", "big"), [(torch.float16, 2048.0), (torch.bfloat16, 256.0)])
def test_halves_are_rounded_once_and_not_at_every_rank(dtype, big):
    assert _reduced([[big], [1.0], [1.0]], "sum", dtype).item() == big + 2


@pytest.mark.parametrize(
    ("dtype", "tie_down", "tie_up"), [(torch.float16, 2048.0, 2050.0), (torch.bfloat16, 256.0, 258.0)]
)
def test_ties_go_to_even(dtype, tie_down, tie_up):
    assert _reduced([[tie_down], [1.0]], "sum", dtype).item() == tie_down
    assert _reduced([[tie_up], [1.0]], "sum", dtype).item() == tie_up + 2
    assert _reduced([[-tie_up], [-1.0]], "sum", dtype).item() == -tie_up - 2


def test_an_average_multiplies_by_the_rounded_reciprocal():
    third = torch.tensor(1.0 / 3.0, dtype=torch.float32)
    expected = (torch.tensor(5.0) * third).item()
    assert _reduced([[1.0], [2.0], [2.0]], "avg", torch.float32).item() == expected
    assert _reduced([[1.0], [2.0], [2.0]], "avg", torch.float64).item() == 5.0 * (1.0 / 3.0)


def test_integers_wrap_around():
    top = torch.iinfo(torch.int32).max
    assert _reduced([[top], [1]], "sum", torch.int32).item() == torch.iinfo(torch.int32).min


@pytest.mark.parametrize("op", ["sum", "avg", "max", "min"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_nan_of_any_rank_stays(op, rank):
    rows = [[1.0], [2.0], [3.0]]
    rows[rank] = [float("nan")]
    assert _reduced(rows, op, torch.bfloat16).isnan().item()


def _lists(results):
    return [None if result is None else result.tolist() for result in results]


A, B = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[10, 20], [30, 40]])


def test_a_reduce_gives_the_root_alone_the_total():
    assert _lists(reference.reduce([A, B], 1)) == [None, [[11, 22], [33, 44]]]
    assert _lists(reference.reduce([A, B], 0, "max")) == [[[10, 20], [30, 40]], None]


def test_a_reduce_scatter_cuts_the_total():
    assert _lists(reference.reduce_scatter([A, B])) == [[[11, 22]], [[33, 44]]]
    assert _lists(reference.reduce_scatter([A, B], "min", 1)) == [[[1], [3]], [[2], [4]]]
    assert _lists(reference.reduce_scatter([A, B], "sum", -1, [2, 0])) == [[[11, 22], [33, 44]], [[], []]]


def test_gathers_put_inputs_one_after_another():
    assert _lists(reference.all_gather([A, B])) == [[[1, 2], [3, 4], [10, 20], [30, 40]]] * 2
    assert _lists(reference.all_gather([A, B[:, :1]], 1)) == [[[1, 2, 10], [3, 4, 30]]] * 2
    assert _lists(reference.gather([A, B], 1, -1)) == [None, [[1, 2, 10, 20], [3, 4, 30, 40]]]


def test_a_broadcast_gives_all_the_roots():
    got = reference.broadcast([A, B], 1)
    assert _lists(got) == [B.tolist()] * 2
    assert got[1].data_ptr() != B.data_ptr()


def test_a_scatter_cuts_the_roots():
    assert _lists(reference.scatter([A, B], 1)) == [[[10, 20]], [[30, 40]]]
    assert _lists(reference.scatter([A, B], 0, 1)) == [[[1], [3]], [[2], [4]]]
    assert _lists(reference.scatter([A, B], 0, 0, [0, 2])) == [[], [[1, 2], [3, 4]]]


def test_an_all_to_all_transposes_ranks_and_parts():
    assert _lists(reference.all_to_all([A, B])) == [[[1, 2], [10, 20]], [[3, 4], [30, 40]]]
    ragged = [torch.tensor([1, 2, 3]), torch.tensor([10])]
    assert _lists(reference.all_to_all(ragged, [[1, 2], [0, 1]])) == [[1], [2, 3, 10]]


def test_inputs_are_left_as_they_are():
    inputs = every_ranks_input(1, 3, (5,), torch.float32)
    before = [tensor.clone() for tensor in inputs]
    reference.all_reduce(inputs, "avg")
    assert all(torch.equal(now, then) for now, then in zip(inputs, before, strict=True))


def test_a_wrong_bit_is_noticed():
    x = torch.tensor([1.0, 2.0, float("nan"), 0.0])
    y = x.clone()
    y.view(torch.int32)[1] += 1
    assert difference(x, x) == ""
    assert difference(y, x) == "1 of 4 differ, first [1]: 2.000000238418579 for 2.0"
    assert difference(x, -x * torch.tensor([-1.0, -1.0, 1.0, 1.0])) != ""
    assert difference(torch.tensor([-0.0]), torch.tensor([0.0]), "max") == ""
    assert (
        difference(torch.tensor([1]), torch.tensor([1.0])) == "torch.int64 [1] instead of torch.float32 [1]"
    )
