"""Tables of parts, by carrying out the exchange of all ranks in one process."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcomm import reference
from tcomm.memory.layout import cut
from tcomm.parts import broadcast_parts, exchange_parts, gather_parts, scatter_parts

COUNTS = st.integers(1, 5).flatmap(
    lambda world: st.lists(
        st.lists(st.integers(0, 6), min_size=world, max_size=world), min_size=world, max_size=world
    )
)
SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=5)


def _inputs(lengths):
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()[:-1]]
    return [torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)]


def _exchange(tables, inputs, outputs):
    """Do what the tables say: every source cuts, every destination pastes."""
    for d, taking in enumerate(tables):
        for s, giving in enumerate(tables):
            (first, given), (start, taken) = giving.sends[d], taking.receives[s]
            assert given == taken, (s, d)
            assert first + given <= inputs[s].numel()
            assert start + taken <= outputs[d].numel()
            outputs[d][start : start + taken] = inputs[s][first : first + given]


def _outputs(tables):
    lengths = [max((first + n for first, n in table.receives), default=0) for table in tables]
    return [torch.full((n,), -1) for n in lengths]


def _moved(tables, inputs):
    outputs = _outputs(tables)
    _exchange(tables, inputs, outputs)
    return outputs


def _tables(make, world, *args, **kwargs):
    return [make(*args, rank=rank, **kwargs) for rank in range(world)]


def _assert_equal(got, want):
    assert [x.tolist() for x in got] == [[] if x is None else x.tolist() for x in want]


@given(COUNTS)
def test_an_exchange_is_an_all_to_all(counts):
    inputs = _inputs([sum(row) for row in counts])
    tables = _tables(exchange_parts, len(counts), counts)
    _assert_equal(_moved(tables, inputs), reference.all_to_all(inputs, counts))
    assert {table.longest for table in tables} == {max(max(row) for row in counts)}
    assert not any(table.shared for table in tables)


@given(SIZES)
def test_a_gather_without_root_is_an_all_gather(sizes):
    inputs = _inputs(sizes)
    tables = _tables(gather_parts, len(sizes), sizes)
    _assert_equal(_moved(tables, inputs), reference.all_gather(inputs))
    assert [table.given for table in tables] == [(0, n) for n in sizes]
    assert all(table.shared and table.longest == max(sizes) for table in tables)


@given(SIZES, st.data())
def test_a_gather_gives_the_root_alone(sizes, data):
    root = data.draw(st.integers(0, len(sizes) - 1))
    inputs = _inputs(sizes)
    tables = _tables(gather_parts, len(sizes), sizes, root=root)
    _assert_equal(_moved(tables, inputs), reference.gather(inputs, root))
    assert [table.given for table in tables] == [(0, n) for n in sizes]


@given(st.integers(1, 5), st.integers(0, 9), st.data())
def test_a_broadcast_takes_from_the_root_alone(world, numel, data):
    root = data.draw(st.integers(0, world - 1))
    inputs = _inputs([numel] * world)
    tables = [broadcast_parts(numel, world, rank, root) for rank in range(world)]
    _assert_equal(_moved(tables, inputs), reference.broadcast(inputs, root))
    assert [table.given for table in tables] == [(0, numel if r == root else 0) for r in range(world)]


@given(SIZES, st.data())
def test_a_scatter_cuts_what_the_root_has(sizes, data):
    root = data.draw(st.integers(0, len(sizes) - 1))
    inputs = _inputs([sum(sizes) if rank == root else 0 for rank in range(len(sizes))])
    tables = _tables(scatter_parts, len(sizes), sizes, root=root)
    _assert_equal(_moved(tables, inputs), reference.scatter(inputs, root, 0, sizes))


@given(SIZES)
def test_a_scatter_without_root_brings_together_what_is_to_be_reduced(sizes):
    world = len(sizes)
    inputs = [torch.arange(sum(sizes)) * 10**rank for rank in range(world)]
    tables = _tables(scatter_parts, world, sizes)
    totals = []
    for d, table in enumerate(tables):
        assert set(table.receives) == {(0, sizes[d])}
        cuts = [inputs[s][first : first + n] for s in range(world) for first, n in [tables[s].sends[d]]]
        totals.append(torch.stack(cuts).sum(0))
    _assert_equal(totals, reference.reduce_scatter(inputs, sizes=sizes))


def test_the_numbers_of_the_docstring():
    table = gather_parts((2, 1), 1)
    assert (table.sends, table.receives, table.world_size) == (((0, 1), (0, 1)), ((0, 2), (2, 1)), 2)


MAKERS = st.one_of(
    COUNTS.map(lambda counts: _tables(exchange_parts, len(counts), counts)),
    SIZES.map(lambda sizes: _tables(gather_parts, len(sizes), sizes)),
    SIZES.map(lambda sizes: _tables(gather_parts, len(sizes), sizes, root=0)),
    SIZES.map(lambda sizes: _tables(scatter_parts, len(sizes), sizes, root=0)),
)


def _numels(tables):
    return [max((first + n for first, n in table.sends), default=0) for table in tables]


@given(MAKERS, st.integers(1, 7))
def test_pieces_bring_everything_once_and_nothing_else(tables, length):
    inputs = _inputs(_numels(tables))
    whole, pieced = _moved(tables, inputs), _outputs(tables)
    written = [torch.zeros_like(out) for out in pieced]
    for start, count in cut(tables[0].longest, 128, length * 128):
        pieces = [table.piece(start, count) for table in tables]
        assert len({piece.longest for piece in pieces}) == 1
        assert all(n <= pieces[0].longest for piece in pieces for _, n in (*piece.sends, *piece.receives))
        _exchange(pieces, inputs, pieced)
        for out, piece in zip(written, pieces, strict=True):
            for first, n in piece.receives:
                out[first : first + n] += 1
    _assert_equal(pieced, whole)
    assert all(out.eq(1).all() for out in written)


@given(MAKERS, st.integers(0, 20), st.integers(1, 20))
def test_a_piece_of_a_piece_and_what_is_given_agree(tables, start, length):
    for table in tables:
        piece = table.piece(start, length)
        assert piece.piece(0, length) == piece
        assert piece.rank == table.rank
        if table.shared:
            first, n = table.given
            assert piece.given[1] == max(0, min(n - start, length))
            if piece.given[1]:
                assert piece.given[0] == first + start


@given(MAKERS, st.sampled_from([1, 2, 8, 16]))
def test_scaled_parts_count_bytes(tables, factor):
    for table in tables:
        scaled = table.scaled(factor)
        for ranges, times in ((table.sends, scaled.sends), (table.receives, scaled.receives)):
            assert times == tuple((first * factor, n * factor) for first, n in ranges)
        assert scaled.longest == table.longest * factor
        assert (scaled.rank, scaled.shared) == (table.rank, table.shared)


@pytest.mark.parametrize("world", [1, 3])
def test_nothing_at_all_is_one_empty_part(world):
    for table in _tables(exchange_parts, world, [[0] * world] * world):
        assert table.longest == 0
        assert table.piece(0, 8).longest == 0
        assert all(part == (0, 0) for part in (*table.sends, *table.receives))
