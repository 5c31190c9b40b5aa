"""Many tensors in one: nothing is lost, whatever their dtypes and lengths, and chunks lie rank by rank."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcomm.errors import ConfigError
from tcomm.groups.packing import Packing, Split, describe_kinds, result_tensors
from tests.groups.verbs import MOVED, random_bytes, unequal_bits

SHAPES = st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple)
KINDS = st.lists(st.tuples(SHAPES, st.sampled_from(MOVED), st.integers(0, 2)), min_size=1, max_size=5)


def _splits(kinds, world, dtype=None):
    """Splits into as many chunks of the drawn shape, along a dimension that the shape has."""
    splits = []
    for shape, own, dim in kinds:
        at = dim % len(shape)
        splits.append(Split(_longer(shape, at, world), dtype or own, at, (shape[at],) * world))
    return splits


def _longer(shape, dim, times):
    return (*shape[:dim], shape[dim] * times, *shape[dim + 1 :])


@given(KINDS, st.integers(1, 4), st.booleans(), st.booleans())
def test_what_was_packed_comes_out_again(kinds, world, as_bytes, in_gaps):
    splits = _splits(kinds, world, None if as_bytes else torch.int64)
    packing = Packing(splits, as_bytes)
    tensors = [random_bytes(i, split.shape, split.dtype) for i, split in enumerate(splits)]
    flat = packing.pack(tensors)
    assert (flat.dtype, flat.numel()) == (torch.uint8 if as_bytes else torch.int64, sum(packing.sizes))
    assert len(set(packing.sizes)) == 1
    back = [
        torch.zeros(*x.shape, 2, dtype=x.dtype)[..., 1] if in_gaps else torch.empty_like(x) for x in tensors
    ]
    packing.unpack(flat, back)
    assert [unequal_bits(got, want) for got, want in zip(back, tensors, strict=True)] == [""] * len(tensors)


@given(KINDS, st.integers(2, 4), st.booleans())
def test_chunks_of_one_rank_lie_together_as_that_rank_packs_them(kinds, world, as_bytes):
    """A gather: every rank packs its own chunk, and all of them one after another are the whole."""
    splits = _splits(kinds, world, None if as_bytes else torch.float64)
    whole = Packing(splits, as_bytes)
    tensors = [random_bytes(i, split.shape, split.dtype) for i, split in enumerate(splits)]
    flats = []
    for rank in range(world):
        chunks = [split.chunks(x)[rank] for x, split in zip(tensors, splits, strict=True)]
        mine = Packing([Split.whole(chunk) for chunk in chunks], as_bytes)
        flats.append(mine.pack(chunks))
        assert mine.sizes == (whole.sizes[rank],)
    back = [torch.empty_like(x) for x in tensors]
    whole.unpack(torch.cat(flats), back)
    assert [unequal_bits(got, want) for got, want in zip(back, tensors, strict=True)] == [""] * len(tensors)


def test_mixed_types_begin_where_every_type_may():
    tensors = [torch.ones(3, dtype=torch.uint8), torch.ones(1, dtype=torch.complex128), torch.tensor(True)]
    packing = Packing([Split.whole(x) for x in tensors], True)
    assert packing.sizes == (48,)
    flat = packing.pack(tensors)
    assert flat[16:32].view(torch.complex128).tolist() == [1.0]
    assert flat[32].item() == 1


def test_flags_of_views_are_values():
    x = torch.tensor([1 + 2j, 3 - 1j])
    for view, out in ((x.conj(), x.clone()), (x, x.clone().conj()), (torch._neg_view(x), x.clone())):
        packing = Packing([Split.whole(x)], True)
        packing.unpack(packing.pack([view]), [out])
        assert out.tolist() == view.tolist()


def test_kinds_are_told_in_few_words_that_differ():
    assert describe_kinds([(torch.float32, (2, 3)), (torch.int8, ())]) == "float32 [2, 3]; int8 []"
    many = [(torch.float32, (2, i)) for i in range(200)]
    other = [*many[:-1], (torch.float32, (2, 7))]
    assert len(describe_kinds(many)) < 250
    assert describe_kinds(many) != describe_kinds(other)
    assert describe_kinds(many).startswith("float32 [2, 0]; float32 [2, 1]; ")


def test_results_are_as_given_or_new():
    xs = [torch.ones(2), torch.ones(3, 1, dtype=torch.int8)]
    shapes = [(4,), (6, 1)]
    new = result_tensors("all_gatherv", xs, None, shapes)
    assert [(x.dtype, tuple(x.shape)) for x in new] == [(torch.float32, (4,)), (torch.int8, (6, 1))]
    assert all(map(torch.is_same_size, result_tensors("all_gatherv", xs, tuple(new), shapes), new))
    with pytest.raises(ConfigError) as caught:
        result_tensors("all_gatherv", xs, new[:1], shapes)
    assert str(caught.value) == "out= of all_gatherv has 1 tensors; needed one for each of 2"
    with pytest.raises(ConfigError) as caught:
        result_tensors("all_gatherv", xs, new[::-1], shapes)
    assert str(caught.value) == ("out= of all_gatherv is int8 [6, 1] on cpu; needed float32 [4] on cpu")
