import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcomm.errors import ConfigError
from tcomm.memory.layout import ALIGNMENT, StagingLayout, cut, slice_numel

NBYTES = st.integers(64 * 1024 // 8, 1 << 34).map(lambda words: 8 * words)
WORLDS = st.integers(1, 16)


def _regions(layout):
    """Every (first, last) byte that belongs to one parity and one source."""
    lanes = [
        (parity * layout.lane_half_bytes + source * layout.lane_slot_bytes, layout.lane_slot_bytes)
        for parity in (0, 1)
        for source in range(layout.world_size)
    ]
    slots = [
        (layout.half(parity) + source * layout.slot_bytes, layout.slot_bytes)
        for parity in (0, 1)
        for source in range(layout.world_size)
    ]
    return [(first, first + size) for first, size in (*lanes, *slots)]


@given(NBYTES, WORLDS)
def test_regions_are_aligned_disjoint_and_within_the_buffer(nbytes, world_size):
    layout = StagingLayout(nbytes, world_size)
    regions = _regions(layout)
    assert all(first % ALIGNMENT == 0 and stop > first for first, stop in regions)
    assert all(stop <= following for (_, stop), (following, _) in itertools.pairwise(regions))
    assert regions[-1][1] <= nbytes


@given(NBYTES, WORLDS)
def test_halves_do_not_touch_lanes_or_one_another(nbytes, world_size):
    layout = StagingLayout(nbytes, world_size)
    assert layout.half(0) == layout.half_offset == 2 * layout.lane_half_bytes
    assert layout.half(1) == layout.half(0) + layout.half_bytes
    assert layout.half(1) + layout.half_bytes <= nbytes
    assert world_size * layout.slot_bytes <= layout.half_bytes


@given(NBYTES, WORLDS)
def test_little_is_wasted(nbytes, world_size):
    layout = StagingLayout(nbytes, world_size)
    used = layout.half_offset + 2 * world_size * layout.slot_bytes
    assert nbytes - used < 2 * ALIGNMENT * (world_size + 2)


@given(st.integers(1, 1 << 32), WORLDS)
def test_staging_for_a_message_takes_it_in_one_piece(nbytes, world_size):
    layout = StagingLayout(StagingLayout.for_message(nbytes, world_size), world_size)
    assert layout.slot_bytes >= nbytes
    assert layout.half_bytes >= nbytes
    assert layout.nbytes % 4096 == 0
    assert layout.nbytes <= 2.4 * nbytes * world_size + 128 * 1024


@pytest.mark.parametrize("nbytes", [0, -4096, 4096, 64 * 1024 - 1])
def test_too_little_staging_is_refused(nbytes):
    with pytest.raises(ConfigError) as caught:
        StagingLayout(nbytes, 2)
    assert str(caught.value) == f"staging of {nbytes} bytes a rank is too small; give at least 65536"


@given(st.integers(0, 10_000), st.sampled_from([1, 2, 4, 8]), st.integers(ALIGNMENT, 1 << 16))
def test_pieces_cover_a_message_once_in_order_and_fit(numel, itemsize, capacity):
    pieces = cut(numel, itemsize, capacity)
    ends = list(itertools.accumulate(length for _, length in pieces))
    assert [start for start, _ in pieces] == [0, *ends[:-1]]
    assert ends[-1] == numel
    assert all(length * itemsize <= capacity for _, length in pieces)
    assert all(start * itemsize % ALIGNMENT == 0 for start, _ in pieces)
    assert all(length > 0 for _, length in pieces) or pieces == [(0, 0)]


def test_an_empty_message_is_one_empty_piece():
    assert cut(0, 4, 1024) == [(0, 0)]


@pytest.mark.parametrize("capacity", [0, 1, ALIGNMENT - 1, -1])
def test_a_capacity_without_an_aligned_piece_is_refused(capacity):
    with pytest.raises(ConfigError) as caught:
        cut(10, 4, capacity)
    assert str(caught.value) == (
        f"a capacity of {capacity} bytes holds no aligned piece; enlarge the staging"
    )


@given(st.integers(0, 1 << 40), st.sampled_from([2, 4, 8]), WORLDS)
def test_slices_are_aligned_and_cover_the_message(numel, itemsize, world_size):
    length = slice_numel(numel, itemsize, world_size)
    assert length * itemsize % ALIGNMENT == 0
    assert length * world_size >= numel
    assert length < -(-numel // world_size) + ALIGNMENT // itemsize
