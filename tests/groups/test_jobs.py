"""What calls come to, without any rank: a whole collective carried out by the jobs of all ranks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcomm import reference
from tcomm.algorithms import FAMILIES
from tcomm.errors import ConfigError
from tcomm.groups.jobs import JOBS, Caller, Chunks

INT64 = torch.int64


def _jobs(verb, inputs, *args):
    world = len(inputs)
    return [JOBS[verb](Caller(r, world, x.shape, x.dtype), *args) for r, x in enumerate(inputs)]


def _carried_out(verb, inputs, *args):
    """Results of all ranks: packed, moved or added up, and unpacked as the jobs say."""
    jobs = _jobs(verb, inputs, *args)
    assert len({(job.call, job.nbytes) for job in jobs}) == 1
    flats = []
    for job, x in zip(jobs, inputs, strict=True):
        flat = x.reshape(-1).clone()
        if job.packs is not None:
            job.packs.pack(x, flat)
        flats.append(flat)
    return [_result(rank, jobs, flats) for rank in range(len(jobs))]


def _result(rank, jobs, flats):
    job = jobs[rank]
    taken = sum(n for _, n in job.parts.receives)
    if job.shape is None:
        assert taken == 0
        return None
    flat = torch.zeros(math.prod(job.shape), dtype=INT64)
    for source, theirs in enumerate(jobs):
        (first, n), (start, expected) = theirs.parts.sends[rank], job.parts.receives[source]
        assert n == expected
        if job.call.reduce:
            flat[start : start + n] += flats[source][first : first + n]
        else:
            flat[start : start + n] = flats[source][first : first + n]
    if job.unpacks is None:
        return flat.view(job.shape)
    out = torch.zeros(job.shape, dtype=INT64)
    job.unpacks.unpack(flat, out)
    return out


def _assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a is None and b is None) or (a.shape == b.shape and a.equal(b))


def _inputs(shapes):
    return [torch.arange(math.prod(shape)).view(shape) + 10_000 * r for r, shape in enumerate(shapes)]


def _with(shape, dim, length):
    shape = list(shape)
    shape[dim] = length
    return tuple(shape)


SHAPES = st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple)


@given(st.data(), SHAPES, st.integers(1, 4))
def test_equal_parts_along_any_dimension(data, shape, world):
    dim, root = data.draw(st.integers(-len(shape), len(shape) - 1)), data.draw(st.integers(0, world - 1))
    inputs = _inputs([_with(shape, dim, world * shape[dim])] * world)
    _assert_equal(_carried_out("scatter", inputs, root, dim), reference.scatter(inputs, root, dim))
    _assert_equal(_carried_out("gather", inputs, root, dim), reference.gather(inputs, root, dim))
    _assert_equal(_carried_out("all_gather_single", inputs, dim), reference.all_gather(inputs, dim))
    scattered = _carried_out("reduce_scatter_single", inputs, "sum", dim)
    _assert_equal(scattered, reference.reduce_scatter(inputs, "sum", dim))
    _assert_equal(_carried_out("broadcast", inputs, root), reference.broadcast(inputs, root))
    _assert_equal(_carried_out("reduce", inputs, root, "sum"), reference.reduce(inputs, root))


@given(st.data(), SHAPES, st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_unequal_parts_along_any_dimension(data, shape, sizes):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    inputs = _inputs([_with(shape, dim, n) for n in sizes])
    _assert_equal(_carried_out("all_gatherv", inputs, sizes, dim), reference.all_gather(inputs, dim))
    inputs = _inputs([_with(shape, dim, sum(sizes))] * len(sizes))
    got = _carried_out("reduce_scatterv", inputs, sizes, "sum", dim)
    _assert_equal(got, reference.reduce_scatter(inputs, "sum", dim, sizes))


@given(st.data(), st.integers(1, 4), st.integers(0, 3))
def test_exchanges_equal_and_ragged(data, world, row):
    line = st.lists(st.integers(0, 3), min_size=world, max_size=world).map(tuple)
    counts = tuple(data.draw(st.lists(line, min_size=world, max_size=world)))
    inputs = _inputs([(sum(of), row) for of in counts])
    got = _carried_out("all_to_all_ragged", inputs, counts)
    _assert_equal(got, reference.all_to_all(inputs, counts))
    inputs = _inputs([(2 * world, row)] * world)
    _assert_equal(_carried_out("all_to_all_single", inputs), reference.all_to_all(inputs))


def test_every_verb_of_a_family_has_a_job():
    assert set(JOBS) == {*FAMILIES, "all_to_all_ragged"} - {"send", "recv"}


@given(SHAPES, st.data())
def test_taking_apart_and_putting_together_undo_one_another(shape, data):
    dim = data.draw(st.integers(0, len(shape) - 1))
    cuts = sorted(data.draw(st.lists(st.integers(0, shape[dim]), max_size=3)))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, shape[dim]], strict=True)]
    chunks, x = Chunks(shape, dim, tuple(sizes)), torch.arange(math.prod(shape)).view(shape)
    flat, back = torch.zeros(x.numel(), dtype=INT64), torch.zeros(shape, dtype=INT64)
    chunks.pack(x, flat)
    assert flat.tolist() == [v for part in x.split(sizes, dim) for v in part.reshape(-1).tolist()]
    chunks.unpack(flat, back)
    assert back.equal(x)
    assert not chunks.is_flat or flat.equal(x.view(-1))


def _job(verb, shape, *args, rank=0, world=2):
    return JOBS[verb](Caller(rank, world, torch.Size(shape), torch.float32), *args)


@pytest.mark.parametrize(
    ("verb", "shape", "args", "allowed"),
    [
        ("all_reduce", (4,), ("sum",), True),
        ("broadcast", (4,), (1,), True),
        ("reduce", (4,), (0, "sum"), True),
        ("all_to_all_single", (4,), (), True),
        ("barrier", (0,), (), True),
        ("all_to_all_ragged", (3,), (((1, 2), (2, 1)),), True),
        ("all_to_all_ragged", (3,), (((1, 2), (1, 2)),), False),
        ("all_gather_single", (4,), (0,), False),
        ("all_gather_single", (2, 4), (1,), False),
        ("scatter", (4,), (0, 0), False),
        ("gather", (4,), (0, 0), False),
        ("reduce_scatterv", (4,), ((4, 0), "sum", 0), True),
        ("reduce_scatterv", (2, 4), ((4, 0), "sum", 1), False),
    ],
)
def test_only_what_stays_in_its_place_may_be_its_own_result(verb, shape, args, allowed):
    assert _job(verb, shape, *args).may_alias is allowed


@pytest.mark.parametrize(
    ("verb", "shape", "args", "nbytes"),
    [
        ("all_reduce", (5,), ("sum",), 20),
        ("broadcast", (5,), (0,), 20),
        ("reduce", (5,), (0, "sum"), 20),
        ("all_gather_single", (5,), (0,), 40),
        ("all_gatherv", (5,), ((5, 1), 0), 24),
        ("gather", (5,), (1, 0), 40),
        ("scatter", (6,), (1, 0), 24),
        ("reduce_scatter_single", (6,), ("sum", 0), 24),
        ("all_to_all_single", (6,), (), 24),
        ("all_to_all_ragged", (3,), (((1, 2), (4, 0)),), 16),
        ("barrier", (0,), (), 0),
    ],
)
def test_bytes_are_counted_as_nccl_tests_does(verb, shape, args, nbytes):
    assert _job(verb, shape, *args).nbytes == nbytes


@pytest.mark.parametrize(
    ("verb", "shape", "args", "told"),
    [
        ("all_reduce", (4,), ("mean",), "reduce operation 'mean' is unknown; give one of sum, avg, max, min"),
        ("reduce", (4,), (2, "sum"), "root=2 of reduce is not a rank of this group; ranks are 0 to 1"),
        ("broadcast", (4,), (None,), "root=None of broadcast is not a rank of this group"),
        ("all_gather_single", (), (0,), "all_gather_single of a 0-d tensor has no dimension to go along"),
        ("gather", (2,), (0, 1), "dim=1 of gather: a tensor of shape [2] has dimensions -1 to 0"),
        ("scatter", (2, 3), (0, -1), "scatter of [2, 3]: 3 along dim 1 does not divide by 2 ranks"),
        (
            "all_gatherv",
            (3, 2),
            ((4, 1), 0),
            "all_gatherv: sizes=[4, 1] gives rank 0 4 rows, its ",
        ),
        ("reduce_scatterv", (3, 2), ((4, 1), "sum", 0), "reduce_scatterv: sizes=[4, 1] adds up to 5, the "),
        ("all_to_all_single", (), (), "all_to_all_single of a 0-d tensor has no rows; reshape(1)"),
        ("all_to_all_single", (3,), (), "3 rows do not divide among 2 ranks; give send_splits="),
    ],
)
def test_what_fits_no_rank_is_refused(verb, shape, args, told):
    with pytest.raises(ConfigError) as caught:
        _job(verb, shape, *args)
    assert str(caught.value).startswith(told)
